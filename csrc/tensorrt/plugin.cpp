// YoloV4Detect, a plugin for TensorRT 10 and 11: raw maps in, detections out; what it computes and its outputs are in
// yolov4_fast/engines/tensorrt/plugins.py.
//
// The library exports what IPluginRegistry::loadLibrary looks for, getCreators and setLoggerFinder, and links to
// neither TensorRT nor torch. A program that only opens libraries (dlopen, LD_PRELOAD) has it register itself where
// YOLOV4_FAST_REGISTER_PLUGIN is 1.
#include <dlfcn.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <NvInfer.h>

#include "settings.h"

namespace yolov4_fast {
namespace {

using namespace nvinfer1;

constexpr const char* NAME = "YoloV4Detect";
constexpr const char* VERSION = "1";
constexpr int32_t OUTPUTS = 4;  // num_detections, detection_boxes, detection_scores, detection_classes

std::atomic<ILoggerFinder*> logger_finder{nullptr};

void log_error(const std::string& text) noexcept {
  const std::string message = std::string(NAME) + ": " + text;
  ILoggerFinder* const finder = logger_finder;
  ILogger* const logger = finder ? finder->findLogger() : nullptr;
  if (logger) {
    logger->log(ILogger::Severity::kERROR, message.c_str());
  } else {
    std::fprintf(stderr, "%s\n", message.c_str());
  }
}

// What `function` gives; where it throws, the error is logged and `failed` given.
template <typename Result, typename Function>
Result guarded(Result failed, const Function& function) noexcept {
  try {
    return function();
  } catch (const std::exception& error) {
    log_error(error.what());
    return failed;
  }
}

class Plugin final : public IPluginV3,
                     public IPluginV3OneCore,
                     public IPluginV3OneBuild,
                     public IPluginV3OneRuntime {
 public:
  explicit Plugin(Settings settings) : settings_(std::move(settings)), fields_(fields_of(settings_)) {
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }

  IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
    switch (type) {
      case PluginCapabilityType::kCORE:
        return static_cast<IPluginV3OneCore*>(this);
      case PluginCapabilityType::kBUILD:
        return static_cast<IPluginV3OneBuild*>(this);
      case PluginCapabilityType::kRUNTIME:
        return static_cast<IPluginV3OneRuntime*>(this);
    }
    return nullptr;
  }

  IPluginV3* clone() noexcept override {
    return guarded<IPluginV3*>(nullptr, [&] { return new Plugin(settings_); });
  }

  const char* getPluginName() const noexcept override { return NAME; }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return ""; }

  int32_t getNbOutputs() const noexcept override { return OUTPUTS; }

  int32_t getOutputDataTypes(
      DataType* outputs, int32_t output_count, const DataType*, int32_t input_count) const noexcept override {
    return guarded(1, [&] {
      check_counts(input_count, output_count);
      for (int32_t i = 0; i < OUTPUTS; ++i) {
        outputs[i] = output_type(i);
      }
      return 0;
    });
  }

  int32_t getOutputShapes(
      const DimsExprs* inputs, int32_t input_count, const DimsExprs*, int32_t, DimsExprs* outputs,
      int32_t output_count, IExprBuilder& builder) noexcept override {
    return guarded(1, [&] {
      check_counts(input_count, output_count);
      for (int32_t i = 0; i < input_count; ++i) {
        if (inputs[i].nbDims != 4) {
          throw Refused(
              "map " + std::to_string(i) + " must have 4 dimensions, not " + std::to_string(inputs[i].nbDims));
        }
      }
      const IDimensionExpr* const batch = inputs[0].d[0];
      const IDimensionExpr* const rows = builder.constant(settings_.max_detections);
      outputs[0] = {2, {batch, builder.constant(1)}};
      outputs[1] = {3, {batch, rows, builder.constant(4)}};
      outputs[2] = {2, {batch, rows}};
      outputs[3] = {2, {batch, rows}};
      return 0;
    });
  }

  bool supportsFormatCombination(
      int32_t position, const DynamicPluginTensorDesc* tensors, int32_t input_count, int32_t) noexcept override {
    const PluginTensorDesc& tensor = tensors[position].desc;
    if (tensor.format != TensorFormat::kLINEAR) {
      return false;
    }
    if (position >= input_count) {
      return tensor.type == output_type(position - input_count);
    }
    if (position > 0) {
      return tensor.type == tensors[0].desc.type;
    }
    return tensor.type == DataType::kFLOAT || tensor.type == DataType::kHALF || tensor.type == DataType::kBF16;
  }

  // The largest shapes must fit the attributes; smaller ones do then too.
  int32_t configurePlugin(
      const DynamicPluginTensorDesc* inputs, int32_t input_count, const DynamicPluginTensorDesc*,
      int32_t output_count) noexcept override {
    return guarded(1, [&] {
      check_counts(input_count, output_count);
      largest(inputs, input_count);
      return 0;
    });
  }

  size_t getWorkspaceSize(
      const DynamicPluginTensorDesc* inputs, int32_t input_count, const DynamicPluginTensorDesc*,
      int32_t) const noexcept override {
    return guarded(size_t{0}, [&] {
      Detect detect = largest(inputs, input_count);
      return place_workspace(detect, nullptr);
    });
  }

  int32_t onShapeChange(
      const PluginTensorDesc* inputs, int32_t input_count, const PluginTensorDesc*,
      int32_t output_count) noexcept override {
    return guarded(1, [&] {
      check_counts(input_count, output_count);
      detect_for(inputs);
      return 0;
    });
  }

  int32_t enqueue(
      const PluginTensorDesc* input_descs, const PluginTensorDesc*, const void* const* inputs, void* const* outputs,
      void* workspace, cudaStream_t stream) noexcept override {
    return guarded(1, [&] {
      Detect detect = detect_for(input_descs);
      for (size_t i = 0; i < settings_.heads(); ++i) {
        detect.heads[i].raw = inputs[i];
      }
      detect.kept = static_cast<int32_t*>(outputs[0]);
      detect.boxes = static_cast<float*>(outputs[1]);
      detect.scores = static_cast<float*>(outputs[2]);
      detect.class_ids = static_cast<int32_t*>(outputs[3]);
      place_workspace(detect, static_cast<unsigned char*>(workspace));
      if (const char* const error = launch_detect(detect, stream)) {
        throw std::runtime_error(std::string("the kernels did not start: ") + error);
      }
      return 0;
    });
  }

  IPluginV3* attachToContext(IPluginResourceContext*) noexcept override { return clone(); }

  const PluginFieldCollection* getFieldsToSerialize() noexcept override { return &collection_; }

 private:
  static DataType output_type(int32_t output) {
    return output == 1 || output == 2 ? DataType::kFLOAT : DataType::kINT32;
  }

  void check_counts(int32_t inputs, int32_t outputs) const {
    if (static_cast<size_t>(inputs) != settings_.heads() || outputs != OUTPUTS) {
      throw Refused(
          "there are " + std::to_string(inputs) + " inputs and " + std::to_string(outputs) + " outputs for " +
          std::to_string(settings_.heads()) + " heads and " + std::to_string(OUTPUTS) + " outputs");
    }
  }

  Detect largest(const DynamicPluginTensorDesc* inputs, int32_t count) const {
    std::vector<Dims> maps;
    for (int32_t i = 0; i < count; ++i) {
      maps.push_back(inputs[i].max);
    }
    return make_detect(settings_, maps, inputs[0].desc.type);
  }

  Detect detect_for(const PluginTensorDesc* inputs) const {
    std::vector<Dims> maps;
    for (size_t i = 0; i < settings_.heads(); ++i) {
      maps.push_back(inputs[i].dims);
    }
    return make_detect(settings_, maps, inputs[0].type);
  }

  const Settings settings_;
  const std::vector<PluginField> fields_;  // they point into settings_
  PluginFieldCollection collection_{};
};

class Creator final : public IPluginCreatorV3One {
 public:
  Creator() {
    for (const PluginField& field : fields_of(Settings{})) {
      fields_.emplace_back(field.name, nullptr, field.type, 1);
    }
    collection_ = {static_cast<int32_t>(fields_.size()), fields_.data()};
  }

  IPluginV3* createPlugin(
      const char*, const PluginFieldCollection* fields, TensorRTPhase) noexcept override {
    return guarded<IPluginV3*>(nullptr, [&] { return new Plugin(read_settings(fields)); });
  }

  const PluginFieldCollection* getFieldNames() noexcept override { return &collection_; }
  const char* getPluginName() const noexcept override { return NAME; }
  const char* getPluginVersion() const noexcept override { return VERSION; }
  const char* getPluginNamespace() const noexcept override { return ""; }

 private:
  std::vector<PluginField> fields_;
  PluginFieldCollection collection_{};
};

Creator& creator() {
  static Creator instance;
  return instance;
}

__attribute__((constructor)) void register_if_asked() {
  const char* const wanted = std::getenv("YOLOV4_FAST_REGISTER_PLUGIN");
  if (!wanted || std::strcmp(wanted, "1")) {
    return;
  }
  const std::string library = "libnvinfer.so." + std::to_string(NV_TENSORRT_MAJOR);
  void* const tensorrt = dlopen(library.c_str(), RTLD_LAZY);
  void* const symbol = tensorrt ? dlsym(tensorrt, "getPluginRegistry") : nullptr;
  IPluginRegistry* const registry = symbol ? reinterpret_cast<IPluginRegistry* (*)()>(symbol)() : nullptr;
  if (!registry || !registry->registerCreator(creator(), "")) {
    const char* const error = dlerror();
    log_error("it could not register itself with " + library + (error ? std::string(": ") + error : ""));
  }
}

}  // namespace
}  // namespace yolov4_fast

extern "C" {

__attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(int32_t& count) {
  static nvinfer1::IPluginCreatorInterface* const creators[] = {&yolov4_fast::creator()};
  count = 1;
  return creators;
}

__attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) {
  yolov4_fast::logger_finder = finder;
}
}
