#include "settings.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <set>
#include <type_traits>

#include "../decode.h"

namespace yolov4_fast {
namespace {

using nvinfer1::DataType;
using nvinfer1::Dims;
using nvinfer1::PluginField;
using nvinfer1::PluginFieldCollection;
using nvinfer1::PluginFieldType;

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  std::string message;
  const auto text = [](const auto& part) {
    if constexpr (std::is_floating_point_v<std::decay_t<decltype(part)>>) {
      char digits[32];
      std::snprintf(digits, sizeof digits, "%g", static_cast<double>(part));
      return std::string(digits);
    } else if constexpr (std::is_integral_v<std::decay_t<decltype(part)>>) {
      return std::to_string(part);
    } else {
      return std::string(part);
    }
  };
  ((message += text(parts)), ...);
  throw Refused(message);
}

template <typename T>
constexpr PluginFieldType TYPE = std::is_same_v<T, float> ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT32;

template <typename T>
void read(const PluginField& field, std::vector<T>& values) {
  if (field.type != TYPE<T>) {
    refuse(
        "attribute ", field.name, " must be ", std::is_same_v<T, float> ? "float32" : "int32", ", not field type ",
        static_cast<int32_t>(field.type));
  }
  if (field.length < 1 || !field.data) {
    refuse("attribute ", field.name, " has no value");
  }
  const T* const data = static_cast<const T*>(field.data);
  values.assign(data, data + field.length);
}

template <typename T>
void read(const PluginField& field, T& value) {
  std::vector<T> values;
  read(field, values);
  if (values.size() != 1) {
    refuse("attribute ", field.name, " must be one number, not ", values.size());
  }
  value = values[0];
}

template <typename T>
PluginField field_of(const char* name, const std::vector<T>& values) {
  return {name, values.data(), TYPE<T>, static_cast<int32_t>(values.size())};
}

template <typename T>
PluginField field_of(const char* name, const T& value) {
  return {name, &value, TYPE<T>, 1};
}

// The number whose shortest decimal form rounds to this float: ONNX has attributes in single precision only, and a
// scale of 1.2 means 1.2, which is what the other implementations compute with.
double as_written(float value) {
  char text[32];
  for (int digits = 6; digits < 9; ++digits) {
    std::snprintf(text, sizeof text, "%.*g", digits, static_cast<double>(value));
    if (std::strtof(text, nullptr) == value) {
      return std::strtod(text, nullptr);
    }
  }
  return value;
}

void check_range(const char* name, float value) {
  if (!(value >= 0 && value <= 1)) {
    refuse(name, " must be in 0..1, not ", value);
  }
}

void check_heads(const Settings& settings) {
  const size_t heads = settings.heads();
  if (heads > static_cast<size_t>(MOST_HEADS)) {
    refuse("at most ", MOST_HEADS, " heads, not ", heads);
  }
  if (settings.scale_x_y.size() != heads || settings.new_coords.size() != heads || settings.strides.size() != heads) {
    refuse(
        "scale_x_y, new_coords and strides must have a value for each of ", heads, " heads, not ",
        settings.scale_x_y.size(), ", ", settings.new_coords.size(), " and ", settings.strides.size());
  }
  size_t anchors = 0;
  for (size_t i = 0; i < heads; ++i) {
    if (settings.anchor_counts[i] < 1 || settings.anchor_counts[i] > MOST_ANCHORS) {
      refuse("anchor_counts must be 1 to ", MOST_ANCHORS, ", not ", settings.anchor_counts[i], " of head ", i);
    }
    if (settings.strides[i] < 1) {
      refuse("strides must be at least 1, not ", settings.strides[i], " of head ", i);
    }
    if (settings.new_coords[i] != 0 && settings.new_coords[i] != 1) {
      refuse("new_coords must be 0 or 1, not ", settings.new_coords[i], " of head ", i);
    }
    if (!(std::isfinite(settings.scale_x_y[i]) && settings.scale_x_y[i] > 0)) {
      refuse("scale_x_y must be greater than 0, not ", settings.scale_x_y[i], " of head ", i);
    }
    anchors += static_cast<size_t>(settings.anchor_counts[i]);
  }
  if (settings.anchors.size() != 2 * anchors) {
    refuse("anchors must hold 2 numbers for each of ", anchors, " anchors, not ", settings.anchors.size());
  }
  for (const float side : settings.anchors) {
    if (!(std::isfinite(side) && side > 0)) {
      refuse("anchors must be greater than 0, not ", side);
    }
  }
}

void check_settings(const Settings& settings) {
  check_heads(settings);
  if (settings.num_classes < 1) {
    refuse("num_classes must be at least 1, not ", settings.num_classes);
  }
  check_range("confidence", settings.confidence);
  check_range("iou", settings.iou);
  if (!std::isfinite(settings.beta)) {
    refuse("beta must be finite, not ", settings.beta);
  }
  if (settings.max_detections < 1 || settings.max_detections > MAX_CANDIDATES) {
    refuse("max_detections must be 1 to ", MAX_CANDIDATES, ", not ", settings.max_detections);
  }
}

std::string shape_of(const Dims& dims) {
  std::string text = "[";
  for (int32_t i = 0; i < dims.nbDims; ++i) {
    text += (i ? ", " : "") + std::to_string(dims.d[i]);
  }
  return text + "]";
}

MapType map_type(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return MapType::float32;
    case DataType::kHALF:
      return MapType::float16;
    case DataType::kBF16:
      return MapType::bfloat16;
    default:
      refuse("the maps must be float32, float16 or bfloat16, not data type ", static_cast<int32_t>(type));
  }
}

DetectHead make_head(const Settings& settings, size_t index, size_t first_anchor, const Dims& dims) {
  const int32_t anchors = settings.anchor_counts[index];
  const int64_t channels = int64_t{anchors} * (5 + settings.num_classes);
  if (dims.nbDims != 4 || dims.d[1] != channels || dims.d[2] < 1 || dims.d[3] < 1) {
    refuse("map ", index, " must be [batch, ", channels, ", height, width], not ", shape_of(dims));
  }
  DetectHead head{};
  head.anchors = anchors;
  head.height = static_cast<int32_t>(dims.d[2]);
  head.width = static_cast<int32_t>(dims.d[3]);
  head.new_coords = settings.new_coords[index];
  head.bound = raw_bound(settings.confidence, head.new_coords != 0);
  head.scale_x_y = as_written(settings.scale_x_y[index]);
  for (int32_t k = 0; k < 2 * anchors; ++k) {
    const int64_t cells = k % 2 ? dims.d[2] : dims.d[3];
    head.sizes[k] = as_written(settings.anchors[2 * first_anchor + static_cast<size_t>(k)]) /
        static_cast<double>(cells * settings.strides[index]);
  }
  return head;
}

}  // namespace

Settings read_settings(const PluginFieldCollection* fields) {
  Settings settings;
  std::set<std::string> given;
  for (int32_t i = 0; fields && i < fields->nbFields; ++i) {
    const PluginField& field = fields->fields[i];
    bool is_known = false;
    each_attribute(settings, [&](const char* name, auto& value) {
      if (!std::strcmp(name, field.name)) {
        is_known = given.insert(name).second;
        read(field, value);
      }
    });
    if (!is_known) {
      refuse("there is no attribute ", field.name, ", or it is given twice");
    }
  }
  each_attribute(settings, [&](const char* name, const auto&) {
    if (!given.count(name)) {
      refuse("attribute ", name, " is missing");
    }
  });
  check_settings(settings);
  return settings;
}

std::vector<PluginField> fields_of(const Settings& settings) {
  std::vector<PluginField> fields;
  each_attribute(settings, [&](const char* name, const auto& value) { fields.push_back(field_of(name, value)); });
  return fields;
}

Detect make_detect(const Settings& settings, const std::vector<Dims>& maps, DataType type) {
  if (maps.size() != settings.heads()) {
    refuse("there are ", maps.size(), " maps and ", settings.heads(), " heads");
  }
  Detect detect{};
  size_t first_anchor = 0;
  int64_t candidates = 0;
  for (size_t i = 0; i < maps.size(); ++i) {
    detect.heads[i] = make_head(settings, i, first_anchor, maps[i]);
    first_anchor += static_cast<size_t>(settings.anchor_counts[i]);
    if (maps[i].d[0] != maps[0].d[0]) {
      refuse("map ", i, " ", shape_of(maps[i]), " has another batch than the first ", shape_of(maps[0]));
    }
    candidates += maps[i].d[2] * maps[i].d[3] * settings.anchor_counts[i] * settings.num_classes;
  }
  if (candidates > std::numeric_limits<int32_t>::max()) {
    refuse("at most 2^31 - 1 boxes and classes an image, not ", candidates);
  }
  if (maps[0].d[0] < 1 || maps[0].d[0] > MOST_IMAGES) {
    refuse("a batch must be 1 to ", MOST_IMAGES, " images, not ", maps[0].d[0]);
  }
  detect.head_count = static_cast<int32_t>(settings.heads());
  detect.classes = settings.num_classes;
  detect.type = map_type(type);
  detect.confidence = settings.confidence;
  detect.nms.batch = maps[0].d[0];
  detect.nms.detections = settings.max_detections;
  detect.nms.criterion = {as_written(settings.iou), settings.beta >= 0, as_written(settings.beta)};
  return detect;
}

}  // namespace yolov4_fast
