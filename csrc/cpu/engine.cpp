#include "engine.h"

#include <map>
#include <mutex>

namespace mvit3 {
namespace {

// Steps begin..end - 1, each of which works on every row alone: one parallel loop over the rows, in tiles that go
// through all of these steps. `floats` of a row are in maps that only they read, which exist in tiles alone.
struct Chain {
  size_t begin, end;
  int64_t rows, parts, floats = 0;
};

// Where each map of a program begins in an arena, in floats, for one ending, one size of the image, one number of
// images and one of threads.
struct Layout {
  size_t ending;
  int64_t batch, height, width, threads;
  std::vector<MapShape> shapes;
  std::vector<int64_t> begin;
  std::vector<size_t> source;  // of a map that is another one: that one; else the map itself
  std::vector<bool> needed;    // whether an output of the ending depends on the map
  std::vector<bool> in_tiles;  // whether it is inside of a chain; it begins in a tile's row then
  std::vector<Chain> chains;   // in order
  int64_t floats = 0;

  // Whether nothing runs to make a map.
  bool idle(size_t map) const { return !needed[map] || source[map] != map; }
};

class Engine {
 public:
  Engine(int64_t channels, bool bfloat16) : channels_(channels), bfloat16_(bfloat16) {
    MVIT3_CHECK(channels >= 1, "channels must be at least 1, got ", channels);
    MVIT3_CHECK(
        !bfloat16 || kMultipliesBFloat16, "bfloat16 must be false for kernels of a CPU that does not multiply it");
  }

  // Whether products are made of bfloat16.
  bool bfloat16() const { return bfloat16_; }

  // Returns the number of the map that the step writes.
  int64_t add(std::unique_ptr<Step> step, std::vector<int64_t> inputs) {
    MVIT3_CHECK(endings_.empty(), "a step cannot be added to an engine that is finished");
    const Range takes = step->inputs();
    MVIT3_CHECK(
        takes.begin <= int64_t(inputs.size()) && int64_t(inputs.size()) <= takes.end, "inputs must be ", takes.begin,
        " to ", takes.end, " maps for this step, got ", inputs.size());
    for (const int64_t input : inputs)
      MVIT3_CHECK(
          input >= 0 && input <= int64_t(steps_.size()), "inputs must be maps 0 to ", steps_.size(), ", got ", input);
    steps_.push_back({std::move(step), std::move(inputs)});
    return int64_t(steps_.size());
  }

  // An ending: what a call returns. Returns its number. Of several a call names one and runs the steps that it needs.
  int64_t finish(std::vector<int64_t> outputs) {
    MVIT3_CHECK(!outputs.empty(), "outputs must name at least one map");
    for (const int64_t output : outputs)
      MVIT3_CHECK(
          output >= 1 && output <= int64_t(steps_.size()), "outputs must be maps 1 to ", steps_.size(), ", got ",
          output);
    endings_.push_back(std::move(outputs));
    return int64_t(endings_.size()) - 1;
  }

  // x (B, C, H, W) of any strides; contiguous outputs (B, H, W, C). An output that is asked for twice is one tensor.
  std::vector<Tensor> run(const Tensor& x, int64_t number) {
    check_call(x, number);
    const size_t ending = size_t(number);
    const std::vector<int64_t>& outputs = endings_[ending];
    const bool nchw = x.is_contiguous() && takes_nchw();
    const Tensor images = nchw ? x : torch::stable::contiguous(x, torch::headeronly::MemoryFormat::ChannelsLast);
    const int64_t batch = x.size(0), height = x.size(2), width = x.size(3);
    const auto whole = layout(ending, std::max<int64_t>(std::min(batch, most_images()), 1), height, width);
    std::vector<Tensor> results;
    std::vector<float*> result_data;
    for (const int64_t output : outputs) {
      const size_t before = std::find(outputs.begin(), outputs.end(), output) - outputs.begin();
      const MapShape& shape = whole->shapes[output];
      results.push_back(
          before < results.size() ? results[before]
                                  : torch::stable::new_empty(x, {batch, shape.height, shape.width, shape.channels}));
      result_data.push_back(mutable_data_of<float>(results.back()));
    }
    const int64_t groups = groups_of(batch);
    Arena arena(*this);
    const float* const data = static_cast<const float*>(images.data_ptr());
    for (int64_t group = 0; group < groups; ++group) {
      const Range mine = part_range(batch, group, groups);
      run_group(data, nchw, mine, *layout(ending, mine.size(), height, width), arena, result_data);
    }
    return results;
  }

  // The parallel loops of such a call, in order, each with the number of its step, from 1 on.
  std::vector<std::pair<int64_t, Region>> regions(const Tensor& x, int64_t ending) {
    check_call(x, ending);
    const int64_t batch = x.size(0), height = x.size(2), width = x.size(3);
    std::vector<std::pair<int64_t, Region>> all;
    for (int64_t group = 0; group < groups_of(batch); ++group) {
      const int64_t images = part_range(batch, group, groups_of(batch)).size();
      const auto at = layout(size_t(ending), images, height, width);
      for (size_t i = 0; i < steps_.size(); ++i) {
        if (at->idle(i + 1)) continue;
        if (const Chain* chain = chain_of(*at, i)) {
          all.push_back({int64_t(i) + 1, even_region(chain->rows, chain->parts, steps_[i].step->row_operations())});
          continue;
        }
        std::vector<MapShape> shapes;
        for (const int64_t input : steps_[i].inputs) shapes.push_back(at->shapes[input]);
        for (Region& region : steps_[i].step->regions(shapes, images))
          all.push_back({int64_t(i) + 1, std::move(region)});
      }
    }
    return all;
  }

  // Frees the memory of calls that have ended. Returns the bytes that do not go back to the pool.
  int64_t release() {
    std::vector<Memory> idle;
    const std::lock_guard<std::mutex> lock(mutex_);
    idle.swap(arenas_);
    int64_t bytes = 0;
    for (const Memory& memory : idle) bytes += memory.second.pooled() ? 0 : memory.first * int64_t(sizeof(float));
    return bytes;
  }

 private:
  void check_call(const Tensor& x, int64_t ending) const {
    MVIT3_CHECK(!endings_.empty(), "an engine runs after engine_finish");
    MVIT3_CHECK(
        0 <= ending && ending < int64_t(endings_.size()), "ending must be 0 to ", endings_.size() - 1, ", got ",
        ending);
    MVIT3_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::Float, "x must be a float32 tensor on the CPU");
    MVIT3_CHECK(
        x.dim() == 4 && x.size(1) == channels_, "x must be images (B, ", channels_, ", H, W), got shape ",
        text(x.sizes()));
    check_pixels("x", x.size(2), x.size(3));
  }

  using Memory = std::pair<int64_t, Scratch<float>>;

  // Groups of almost equal size: maps of a few images stay in the last-level cache, where those of a whole batch would
  // not. More cores come with more cache, and share more images out more evenly.
  static int64_t most_images() { return std::max<int64_t>(4, torch::stable::get_num_threads() / 4); }
  static int64_t groups_of(int64_t batch) { return (batch + most_images() - 1) / most_images(); }

  struct Node {
    std::unique_ptr<Step> step;
    std::vector<int64_t> inputs;
  };

  // Memory for one call, taken from those that earlier calls left, so that calls at the same time do not meet.
  class Arena {
   public:
    explicit Arena(Engine& engine) : engine_(engine) {
      const std::lock_guard<std::mutex> lock(engine.mutex_);
      if (!engine.arenas_.empty()) {
        memory_ = std::move(engine.arenas_.back());
        engine.arenas_.pop_back();
      }
    }
    ~Arena() {
      const std::lock_guard<std::mutex> lock(engine_.mutex_);
      engine_.arenas_.push_back(std::move(memory_));
    }
    float* floats(int64_t count) {
      if (memory_.first < count) memory_ = {count, Scratch<float>(count)};
      return memory_.second.data();
    }

   private:
    Engine& engine_;
    Memory memory_{0, Scratch<float>(1)};
  };

  // Callers mostly pass contiguous images (batch, channels, height, width), which only some steps can read. Whether all
  // steps that read the images are such: the images are then not copied.
  bool takes_nchw() const {
    return std::all_of(steps_.begin(), steps_.end(), [](const Node& node) {
      return node.step->takes_nchw() || std::find(node.inputs.begin(), node.inputs.end(), 0) == node.inputs.end();
    });
  }

  void run_group(
      const float* x, bool nchw, Range images, const Layout& at, Arena& arena,
      const std::vector<float*>& results) const {
    float* memory = arena.floats(at.floats);
    std::vector<Map> maps(steps_.size() + 1);
    maps[0] = {const_cast<float*>(x) + images.begin * at.shapes[0].floats(), at.shapes[0], images.size(), nchw};
    for (size_t i = 1; i < maps.size(); ++i) maps[i] = {memory + at.begin[i], at.shapes[i], images.size()};
    const std::vector<int64_t>& outputs = endings_[at.ending];
    for (size_t k = 0; k < outputs.size(); ++k)
      maps[outputs[k]].data = results[k] + images.begin * at.shapes[outputs[k]].floats();
    std::vector<Map> inputs;
    for (size_t i = 0; i < steps_.size(); ++i) {
      if (const Chain* chain = chain_of(at, i)) {
        run_chain(at, *chain, maps);
        i = chain->end - 1;
        continue;
      }
      if (at.idle(i + 1)) continue;
      inputs.clear();
      for (const int64_t input : steps_[i].inputs) inputs.push_back(maps[at.source[input]]);
      steps_[i].step->run(inputs, maps[i + 1]);
    }
  }

  static const Chain* chain_of(const Layout& at, size_t step) {
    for (const Chain& chain : at.chains)
      if (chain.begin <= step && step < chain.end) return &chain;
    return nullptr;
  }

  void run_chain(const Layout& at, const Chain& chain, const std::vector<Map>& maps) const {
    for_each_tile(chain.rows, chain.parts, [&](int64_t, int64_t first, int64_t count) {
      const OneThread alone;
      float* memory = workspace<3>(kTileRows * chain.floats);
      const auto rows = [&](size_t map) {
        const int64_t channels = at.shapes[map].channels, source = at.source[map];
        float* data = at.in_tiles[source] ? memory + kTileRows * at.begin[source] : maps[source].row(first);
        return Map{data, {count, 1, channels}, 1};
      };
      std::vector<Map> inputs;
      for (size_t i = chain.begin; i < chain.end; ++i) {
        if (at.idle(i + 1)) continue;
        inputs.clear();
        for (const int64_t input : steps_[i].inputs) inputs.push_back(rows(input));
        steps_[i].step->run(inputs, rows(i + 1));
      }
    });
  }

  std::shared_ptr<const Layout> layout(size_t ending, int64_t batch, int64_t height, int64_t width) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const int64_t threads = torch::stable::get_num_threads();
    for (const auto& known : layouts_)
      if (known->ending == ending && known->batch == batch && known->height == height && known->width == width &&
          known->threads == threads)
        return known;
    if (layouts_.size() >= 16) layouts_.erase(layouts_.begin());  // images of ever other sizes
    layouts_.push_back(plan(ending, batch, height, width));
    return layouts_.back();
  }

  std::shared_ptr<const Layout> plan(size_t ending, int64_t batch, int64_t height, int64_t width) const {
    const size_t count = steps_.size() + 1;
    auto out = std::make_shared<Layout>();
    *out = {
        ending,
        batch,
        height,
        width,
        torch::stable::get_num_threads(),
        std::vector<MapShape>(count),
        std::vector<int64_t>(count, 0),
        std::vector<size_t>(count, 0),
        std::vector<bool>(count, false),
        std::vector<bool>(count, false)};
    for (const int64_t output : endings_[ending]) out->needed[output] = true;
    for (size_t i = steps_.size(); i-- > 0;)
      for (const int64_t input : steps_[i].inputs) out->needed[input] = out->needed[input] || out->needed[i + 1];
    out->shapes[0] = {height, width, channels_};
    std::vector<size_t> last(count, 0);  // the step that reads a map last
    for (size_t i = 0; i < steps_.size(); ++i) {
      std::vector<MapShape> shapes;
      for (const int64_t input : steps_[i].inputs) {
        shapes.push_back(out->shapes[input]);
        MVIT3_CHECK(!shapes.back().rounded || steps_[i].step->takes_rounded(), "step ", i + 1, " takes no bfloat16");
        if (out->needed[i + 1]) last[out->source[input]] = i;
      }
      out->shapes[i + 1] = steps_[i].step->shape(shapes);
      out->source[i + 1] =
          steps_[i].step->is_identity(shapes) && !is_output(ending, i + 1) ? out->source[steps_[i].inputs[0]] : i + 1;
    }
    for (const int64_t output : endings_[ending])
      MVIT3_CHECK(!out->shapes[output].rounded, "outputs must be maps of float32, got ", output, ", of bfloat16");
    find_chains(*out, last);
    place_maps(*out, last);
    return out;
  }

  bool is_output(size_t ending, size_t map) const {
    const std::vector<int64_t>& outputs = endings_[ending];
    return std::find(outputs.begin(), outputs.end(), int64_t(map)) != outputs.end();
  }

  // Chains are as long as they can be. Where a thread would get less than two blocks of rows, each step cuts its work
  // in its own way. What a chain reads lives until its end: some rows are through while others have not begun.
  void find_chains(Layout& at, std::vector<size_t>& last) const {
    for (size_t begin = 0, end; begin < steps_.size(); begin = std::max(begin + 1, end)) {
      const int64_t pixels = at.shapes[begin + 1].pixels();
      int64_t running = 0, operations = 0;
      for (end = begin; end < steps_.size(); ++end) {
        if (at.idle(end + 1)) continue;
        if (steps_[end].step->row_operations() == 0 || at.shapes[end + 1].pixels() != pixels) break;
        operations += steps_[end].step->row_operations();
        ++running;
      }
      const int64_t rows = at.batch * pixels;
      if (at.idle(begin + 1) || running < 2 || rows < 2 * kBlockRows * at.threads) continue;
      at.chains.push_back({begin, end, rows, spread_parts(rows * operations, 1 << 16)});
      for (size_t i = begin; i < end; ++i) {
        if (at.idle(i + 1)) continue;
        if (last[i + 1] < end && !is_output(at.ending, i + 1)) {
          at.in_tiles[i + 1] = true;
          at.begin[i + 1] = at.chains.back().floats;
          at.chains.back().floats += lanes_of(at.shapes[i + 1].channels);
        }
        for (const int64_t input : steps_[i].inputs) last[at.source[input]] = std::max(last[at.source[input]], end - 1);
      }
    }
  }

  // First fit: a map goes to the lowest place that no map has that is still needed.
  void place_maps(Layout& at, const std::vector<size_t>& last) const {
    const auto size = [&](size_t map) { return round_up(at.batch * at.shapes[map].floats(), 64); };
    const auto in_arena = [&](size_t map) { return !at.idle(map) && !at.in_tiles[map] && !is_output(at.ending, map); };
    for (size_t map = 1; map < last.size(); ++map) {
      if (!in_arena(map)) continue;
      std::map<int64_t, int64_t> taken;  // begin and size
      for (size_t other = 1; other < map; ++other)
        if (in_arena(other) && last[other] + 1 >= map) taken[at.begin[other]] = size(other);
      int64_t begin = 0;
      for (const auto& [start, length] : taken) {
        if (start >= begin + size(map)) break;
        begin = std::max(begin, start + length);
      }
      at.begin[map] = begin;
      at.floats = std::max(at.floats, begin + size(map));
    }
  }

  int64_t channels_;
  bool bfloat16_;
  std::vector<Node> steps_;
  std::vector<std::vector<int64_t>> endings_;
  std::mutex mutex_;
  std::vector<std::shared_ptr<const Layout>> layouts_;
  std::vector<Memory> arenas_;
};

// Engines by number. A call holds its engine, so that one which is freed meanwhile lives on until the call ends.
std::mutex engines_mutex;
std::map<int64_t, std::shared_ptr<Engine>> engines;

std::shared_ptr<Engine> engine_of(int64_t number) {
  const std::lock_guard<std::mutex> lock(engines_mutex);
  const auto found = engines.find(number);
  MVIT3_CHECK(
      found != engines.end(), "engine must be the number of one that engine_new made and nobody freed, got ", number);
  return found->second;
}

int64_t engine_new(int64_t channels, bool bfloat16) {
  static int64_t last = 0;
  const std::lock_guard<std::mutex> lock(engines_mutex);
  engines[++last] = std::make_shared<Engine>(channels, bfloat16);
  return last;
}

int64_t engine_add(
    int64_t number, std::string kind, std::vector<int64_t> inputs, std::vector<Tensor> weights,
    std::vector<int64_t> integers, std::vector<double> numbers) {
  const std::shared_ptr<Engine> engine = engine_of(number);
  return engine->add(make_step(kind, engine->bfloat16(), weights, integers, numbers), std::move(inputs));
}

int64_t engine_finish(int64_t number, std::vector<int64_t> outputs) {
  return engine_of(number)->finish(std::move(outputs));
}

std::vector<Tensor> engine_run(int64_t number, const Tensor& x, int64_t ending) {
  return engine_of(number)->run(x, ending);
}

// How the work of a call on x is cut: a row for each parallel loop, the number of its step and then the operations of
// each part, for the number of threads of the caller. Nothing runs.
Tensor engine_regions(int64_t number, const Tensor& x, int64_t ending) {
  const auto regions = engine_of(number)->regions(x, ending);
  size_t most = 0;
  for (const auto& [step, region] : regions) most = std::max(most, region.size());
  const Tensor out = torch::stable::new_empty(x, {int64_t(regions.size()), int64_t(most) + 1}, ScalarType::Double);
  double* row = mutable_data_of<double>(out);
  for (const auto& [step, region] : regions) {
    row[0] = double(step);
    std::fill(std::copy(region.begin(), region.end(), row + 1), row + most + 1, 0.0);
    row += most + 1;
  }
  return out;
}

void engine_free(int64_t number) {
  const std::shared_ptr<Engine> freed = engine_of(number);  // its weights go after the lock
  const std::lock_guard<std::mutex> lock(engines_mutex);
  engines.erase(number);
}

// Gives memory that no tensor and no call uses now back to the system; returns its bytes.
int64_t release_all() {
  std::vector<std::shared_ptr<Engine>> all;
  {
    const std::lock_guard<std::mutex> lock(engines_mutex);
    for (const auto& [number, engine] : engines) all.push_back(engine);
  }
  int64_t bytes = 0;
  for (const auto& engine : all) bytes += engine->release();
  return bytes + release_memory();
}

}  // namespace
}  // namespace mvit3

STABLE_TORCH_LIBRARY_FRAGMENT(mvit3, m) {
  m.def("engine_new(int channels, bool bfloat16=False) -> int");
  m.def("engine_add(int engine, str kind, int[] inputs, Tensor[] weights, int[] integers, float[] numbers) -> int");
  m.def("engine_finish(int engine, int[] outputs) -> int");
  m.def("engine_run(int engine, Tensor x, int ending=0) -> Tensor[]");
  m.def("engine_regions(int engine, Tensor x, int ending=0) -> Tensor");
  m.def("engine_free(int engine) -> ()");
  m.def("release_memory() -> int");
}

STABLE_TORCH_LIBRARY_IMPL(mvit3, CompositeExplicitAutograd, m) {
  m.impl("engine_new", TORCH_BOX(&mvit3::engine_new));
  m.impl("engine_add", TORCH_BOX(&mvit3::engine_add));
  m.impl("engine_finish", TORCH_BOX(&mvit3::engine_finish));
  m.impl("engine_run", TORCH_BOX(&mvit3::engine_run));
  m.impl("engine_regions", TORCH_BOX(&mvit3::engine_regions));
  m.impl("engine_free", TORCH_BOX(&mvit3::engine_free));
  m.impl("release_memory", TORCH_BOX(&mvit3::release_all));
}
