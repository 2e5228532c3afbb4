// Loads a plugin library as TensorRT does and calls the plugin, for tests in Python; plugin_library.py compiles it
// against the stand-in header. The library is any that was compiled with the same header.
#include <dlfcn.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <NvInfer.h>

using namespace nvinfer1;

namespace {

struct Logger final : ILogger {
  void log(Severity severity, const char* message) noexcept override {
    messages += std::to_string(static_cast<int32_t>(severity)) + " " + message + "\n";
  }
  std::string messages;
};

struct Finder final : ILoggerFinder {
  explicit Finder(Logger& logger) : logger(logger) {}
  ILogger* findLogger() override { return &logger; }
  Logger& logger;
};

struct Constant final : IDimensionExpr {
  explicit Constant(int64_t value) : value(value) {}
  bool isConstant() const noexcept override { return true; }
  int64_t getConstantValue() const noexcept override { return value; }
  int64_t value;
};

struct Builder final : IExprBuilder {
  const IDimensionExpr* constant(int64_t value) noexcept override {
    constants.push_back(std::make_unique<Constant>(value));
    return constants.back().get();
  }
  std::vector<std::unique_ptr<Constant>> constants;
};

struct Library {
  void* handle = nullptr;
  IPluginCreatorV3One* creator = nullptr;
  Logger logger;
  Finder finder{logger};
};

template <typename Capability>
Capability* capability(void* plugin, PluginCapabilityType type) {
  return static_cast<Capability*>(static_cast<IPluginV3*>(plugin)->getCapabilityInterface(type));
}

IPluginV3OneBuild* build_of(void* plugin) {
  return capability<IPluginV3OneBuild>(plugin, PluginCapabilityType::kBUILD);
}

IPluginV3OneRuntime* runtime_of(void* plugin) {
  return capability<IPluginV3OneRuntime>(plugin, PluginCapabilityType::kRUNTIME);
}

// shapes: 4 numbers a map.
std::vector<PluginTensorDesc> descs_of(const int64_t* shapes, int32_t count, int32_t type) {
  std::vector<PluginTensorDesc> descs;
  for (int32_t i = 0; i < count; ++i) {
    PluginTensorDesc desc{{4, {}}, static_cast<DataType>(type), TensorFormat::kLINEAR, -1.0f};
    std::memcpy(desc.dims.d, shapes + 4 * i, 4 * sizeof(int64_t));
    descs.push_back(desc);
  }
  return descs;
}

// The largest shapes; the least have a batch of 1 and the network's own an open one.
std::vector<DynamicPluginTensorDesc> dynamic_descs_of(const int64_t* shapes, int32_t count, int32_t type) {
  std::vector<DynamicPluginTensorDesc> descs;
  for (const PluginTensorDesc& desc : descs_of(shapes, count, type)) {
    DynamicPluginTensorDesc dynamic{desc, desc.dims, desc.dims, desc.dims};
    dynamic.desc.dims.d[0] = -1;
    dynamic.min.d[0] = 1;
    descs.push_back(dynamic);
  }
  return descs;
}

}  // namespace

extern "C" {

Library* library_open(const char* path) {
  auto library = std::make_unique<Library>();
  library->handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library->handle) {
    return nullptr;
  }
  using GetCreators = IPluginCreatorInterface* const* (*)(int32_t&);
  using SetLoggerFinder = void (*)(ILoggerFinder*);
  const auto creators = reinterpret_cast<GetCreators>(dlsym(library->handle, "getCreators"));
  const auto set_finder = reinterpret_cast<SetLoggerFinder>(dlsym(library->handle, "setLoggerFinder"));
  if (!creators || !set_finder) {
    return nullptr;
  }
  set_finder(&library->finder);
  int32_t count = 0;
  IPluginCreatorInterface* const* const all = creators(count);
  if (count != 1 || std::strcmp(all[0]->getInterfaceInfo().kind, "PLUGIN CREATOR_V3ONE")) {
    return nullptr;
  }
  library->creator = static_cast<IPluginCreatorV3One*>(all[0]);
  return library.release();
}

const char* library_problem() { return dlerror(); }

const char* library_messages(Library* library) {
  static std::string taken;
  taken.swap(library->logger.messages);
  library->logger.messages.clear();
  return taken.c_str();
}

// "name version namespace field:type field:type ..."
const char* library_describe(Library* library) {
  static std::string text;
  IPluginCreatorV3One& creator = *library->creator;
  text = std::string(creator.getPluginName()) + " " + creator.getPluginVersion() + " '" + creator.getPluginNamespace() +
      "'";
  const PluginFieldCollection& names = *creator.getFieldNames();
  for (int32_t i = 0; i < names.nbFields; ++i) {
    text += std::string(" ") + names.fields[i].name + ":" + std::to_string(static_cast<int32_t>(names.fields[i].type));
  }
  return text.c_str();
}

void* plugin_create(
    Library* library, int32_t count, const char* const* names, const void* const* data, const int32_t* types,
    const int32_t* lengths, int32_t phase) {
  std::vector<PluginField> fields;
  for (int32_t i = 0; i < count; ++i) {
    fields.emplace_back(names[i], data[i], static_cast<PluginFieldType>(types[i]), lengths[i]);
  }
  const PluginFieldCollection collection{count, fields.data()};
  return library->creator->createPlugin("detect", &collection, static_cast<TensorRTPhase>(phase));
}

void plugin_destroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

void* plugin_clone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }

void* plugin_attach(void* plugin) { return runtime_of(plugin)->attachToContext(nullptr); }

// Through a file's bytes, as in a plan: the fields are copied, and the first plugin is gone before the second is made.
void* plugin_reload(Library* library, void* plugin) {
  const PluginFieldCollection* const collection = runtime_of(plugin)->getFieldsToSerialize();
  std::vector<std::string> names, data;
  std::vector<PluginField> fields;
  for (int32_t i = 0; i < collection->nbFields; ++i) {
    const PluginField& field = collection->fields[i];
    names.emplace_back(field.name);
    data.emplace_back(static_cast<const char*>(field.data), 4 * static_cast<size_t>(field.length));
    fields.push_back(field);
  }
  for (size_t i = 0; i < fields.size(); ++i) {
    fields[i].name = names[i].c_str();
    fields[i].data = data[i].data();
  }
  plugin_destroy(plugin);
  const PluginFieldCollection copied{static_cast<int32_t>(fields.size()), fields.data()};
  return library->creator->createPlugin("detect", &copied, TensorRTPhase::kRUNTIME);
}

const char* plugin_name(void* plugin) {
  return capability<IPluginV3OneCore>(plugin, PluginCapabilityType::kCORE)->getPluginName();
}

int32_t plugin_outputs(void* plugin) { return build_of(plugin)->getNbOutputs(); }

// shapes: room for 1 + 4 numbers an output: rank, then sizes.
int32_t plugin_output_shapes(
    void* plugin, const int64_t* maps, int32_t rank, int32_t count, int64_t* shapes, int32_t outputs) {
  Builder builder;
  std::vector<DimsExprs> inputs(static_cast<size_t>(count)), results(static_cast<size_t>(outputs));
  for (int32_t i = 0; i < count; ++i) {
    inputs[static_cast<size_t>(i)].nbDims = rank;
    for (int32_t axis = 0; axis < rank; ++axis) {
      inputs[static_cast<size_t>(i)].d[axis] = builder.constant(maps[rank * i + axis]);
    }
  }
  const int32_t status =
      build_of(plugin)->getOutputShapes(inputs.data(), count, nullptr, 0, results.data(), outputs, builder);
  for (int32_t i = 0; status == 0 && i < outputs; ++i) {
    const DimsExprs& result = results[static_cast<size_t>(i)];
    shapes[5 * i] = result.nbDims;
    for (int32_t axis = 0; axis < result.nbDims; ++axis) {
      shapes[5 * i + 1 + axis] = result.d[axis]->getConstantValue();
    }
  }
  return status;
}

int32_t plugin_output_types(
    void* plugin, const int32_t* inputs, int32_t count, int32_t* outputs, int32_t output_count) {
  return build_of(plugin)->getOutputDataTypes(
      reinterpret_cast<DataType*>(outputs), output_count, reinterpret_cast<const DataType*>(inputs), count);
}

int32_t plugin_supports(
    void* plugin, int32_t position, const int32_t* types, const int32_t* formats, int32_t inputs, int32_t outputs) {
  std::vector<DynamicPluginTensorDesc> descs(static_cast<size_t>(inputs + outputs));
  for (size_t i = 0; i < descs.size(); ++i) {
    descs[i].desc.type = static_cast<DataType>(types[i]);
    descs[i].desc.format = static_cast<TensorFormat>(formats[i]);
  }
  return build_of(plugin)->supportsFormatCombination(position, descs.data(), inputs, outputs);
}

int32_t plugin_configure(void* plugin, const int64_t* shapes, int32_t count, int32_t type, int32_t outputs) {
  const auto descs = dynamic_descs_of(shapes, count, type);
  const std::vector<DynamicPluginTensorDesc> results(static_cast<size_t>(outputs));
  return build_of(plugin)->configurePlugin(descs.data(), count, results.data(), outputs);
}

uint64_t plugin_workspace(void* plugin, const int64_t* shapes, int32_t count, int32_t type) {
  const auto descs = dynamic_descs_of(shapes, count, type);
  const std::vector<DynamicPluginTensorDesc> results(4);
  return build_of(plugin)->getWorkspaceSize(descs.data(), count, results.data(), 4);
}

int32_t plugin_shape_change(void* plugin, const int64_t* shapes, int32_t count, int32_t type) {
  const auto descs = descs_of(shapes, count, type);
  const std::vector<PluginTensorDesc> results(4);
  return runtime_of(plugin)->onShapeChange(descs.data(), count, results.data(), 4);
}

int32_t plugin_enqueue(
    void* plugin, const int64_t* shapes, int32_t count, int32_t type, const void* const* inputs, void* const* outputs,
    void* workspace, void* stream) {
  const auto descs = descs_of(shapes, count, type);
  const std::vector<PluginTensorDesc> results(4);
  return runtime_of(plugin)->enqueue(
      descs.data(), results.data(), inputs, outputs, workspace, static_cast<cudaStream_t>(stream));
}
}
