// The inference engine: a network as a list of steps on feature maps, run in one call on memory that is kept between
// calls.
//
// A step wraps the forward core of one op with its weights packed once. Maps are numbered: 0 is the image, step i
// writes map i + 1. Where a map lies is planned once per image size, maps that do not live at the same time share
// memory.
#pragma once

#include <memory>
#include <string>

#include "tile.h"

namespace mvit3 {

struct MapShape {
  int64_t height = 0, width = 0, channels = 0;
  bool rounded = false;  // to bfloat16, between a step and the only one that reads it

  int64_t pixels() const { return height * width; }
  int64_t floats() const { return pixels() * channels; }
};

// A contiguous feature map (batch, height, width, channels) of float32, or of bfloat16 where its shape says so.
struct Map {
  float* data = nullptr;
  MapShape shape;
  int64_t batch = 0;
  bool nchw = false;  // only the image: (batch, channels, height, width)

  int64_t rows() const { return batch * shape.pixels(); }
  float* row(int64_t r) const {
    const int64_t bytes = shape.rounded ? sizeof(BFloat16) : sizeof(float);
    return reinterpret_cast<float*>(reinterpret_cast<char*>(data) + r * shape.channels * bytes);
  }
};

class Step {
 public:
  virtual ~Step() = default;
  // How many inputs it takes.
  virtual Range inputs() const { return {1, 1}; }  // both ends included
  // The shape of the output for inputs of these shapes; throws where they do not fit.
  virtual MapShape shape(const std::vector<MapShape>& inputs) const = 0;
  // Whether the output for such inputs is the first input itself, so that nothing needs to run.
  virtual bool is_identity(const std::vector<MapShape>&) const { return false; }
  // Whether its input may be the image as (batch, channels, height, width).
  virtual bool takes_nchw() const { return false; }
  // Whether its input may be of bfloat16.
  virtual bool takes_rounded() const { return false; }
  // Operations of a row, where a row of the output is a function of that row of the inputs alone; else 0.
  virtual int64_t row_operations() const { return 0; }
  virtual void run(const std::vector<Map>& inputs, const Map& output) const = 0;
  // The parallel loops of `run` on `batch` maps of these shapes, cut for the number of threads of the caller; none
  // where a step does not say.
  virtual std::vector<Region> regions(const std::vector<MapShape>&, int64_t) const { return {}; }
};

// Builds a step from its weights, its integers (sizes, flags) and its numbers (eps). steps.cpp says what each kind
// takes. With `bfloat16` its products read operands rounded to bfloat16; its maps are float32 even so.
std::unique_ptr<Step> make_step(
    const std::string& kind, bool bfloat16, const std::vector<Tensor>& weights, const std::vector<int64_t>& integers,
    const std::vector<double>& numbers);

}  // namespace mvit3
