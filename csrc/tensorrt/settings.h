// The attributes of the plugin: what they are, how they are read and checked. yolov4_fast/engines/tensorrt/plugins.py
// writes them into ONNX.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include <NvInfer.h>

#include "detect.h"

namespace yolov4_fast {

// An attribute that is missing or wrong, or maps that do not fit the attributes; the message names it.
struct Refused : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

struct Settings {
  std::vector<float> anchors;          // width and height in pixels of the input, of every anchor of every head
  std::vector<int32_t> anchor_counts;  // of each head
  std::vector<float> scale_x_y;        // of each head
  std::vector<int32_t> new_coords;     // of each head, 0 or 1
  std::vector<int32_t> strides;        // of each head: pixels of the input a cell
  int32_t num_classes = 0;
  float confidence = 0;
  float iou = 0;
  float beta = 0;  // negative: plain IoU
  int32_t max_detections = 0;

  size_t heads() const { return anchor_counts.size(); }
};

// Calls visit(name, value) for every attribute; the value is a number or a vector of them.
template <typename AnySettings, typename Visit>
void each_attribute(AnySettings& settings, const Visit& visit) {
  visit("anchors", settings.anchors);
  visit("anchor_counts", settings.anchor_counts);
  visit("scale_x_y", settings.scale_x_y);
  visit("new_coords", settings.new_coords);
  visit("strides", settings.strides);
  visit("num_classes", settings.num_classes);
  visit("confidence", settings.confidence);
  visit("iou", settings.iou);
  visit("beta", settings.beta);
  visit("max_detections", settings.max_detections);
}

// Of the attributes; throws Refused.
Settings read_settings(const nvinfer1::PluginFieldCollection* fields);

// As fields that point into the settings, which must outlive them.
std::vector<nvinfer1::PluginField> fields_of(const Settings& settings);

// The decode and NMS of maps of these shapes, without pointers; throws Refused where they do not fit the settings.
Detect make_detect(const Settings& settings, const std::vector<nvinfer1::Dims>& maps, nvinfer1::DataType type);

}  // namespace yolov4_fast
