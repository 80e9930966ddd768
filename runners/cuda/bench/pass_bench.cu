// Many tokens at once against float64 on the CPU, then prompts beside the card's matrix rate and batches beside its
// read bandwidth. Exit code 1 if the logits are wrong.
//
//   pass_bench          all of it
//   pass_bench speed    without the checks
//   pass_bench once     one prompt and one step of a batch at d20, for a profiler

#include <algorithm>
#include <cstdio>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <string_view>

#include "../card_cache.h"
#include "../forward_pass.h"
#include "../matmul.h"
#include "../stream.h"
#include "measuring.cuh"
#include "random_model.h"

namespace nanochat_x::cuda {
namespace {

std::unique_ptr<Cache> new_cache(const DecoderModel& m, std::int64_t rows, std::int64_t positions) {
  return std::make_unique<CardCache>(std::ssize(m.layers), m.n_kv_head, rows, positions);
}

// Any keys and values.
void fill(const DecoderModel& m, const CardCache& cache) {
  std::vector<std::uint16_t> noise(m.layers.size() *
                                   static_cast<std::size_t>(cache.rows() * m.n_kv_head * cache.capacity() * 128));
  for (std::size_t i = 0; i < noise.size(); ++i) noise[i] = to_bfloat16(std::sin(static_cast<float>(i % 10007)));
  check(cudaMemcpy(cache.row(0).keys, noise.data(), noise.size() * 2, cudaMemcpyHostToDevice), "copy");
  check(cudaMemcpy(cache.row(0).values, noise.data(), noise.size() * 2, cudaMemcpyHostToDevice), "copy");
}

struct Scenario {
  const char* name;
  RandomShape shape;
  std::int64_t most_tokens;         // of a pass
  std::vector<std::int64_t> first;  // tokens that each row is fed by itself
  std::vector<std::int64_t> steps;  // tokens that each row is then fed with the others, step by step
  std::int64_t prompt = 0;          // tokens that rows begin with which are samples of it; 0: rows of their own
  std::int64_t back = 0;            // position to which all rows then go back, for the same steps again; 0: none
  std::int64_t claimed = 0;         // leading positions that are taken to be alike in all rows, and are not
};

// Sequences on the card and in float64, fed with the same random tokens.
class Both {
 public:
  Both(const Scenario& scenario, bool spoil)
      : shape_(scenario.shape),
        model_(random_model(shape_, 7)),
        pass_(model_.card, scenario.most_tokens),
        decoder_(model_.card),
        claimed_(scenario.claimed) {
    if (spoil) model_.host.smear_lambda = 0;
    const std::size_t rows = scenario.prompt > 0 ? 1 : scenario.first.size();
    cache_ = new_cache(model_.card, static_cast<std::int64_t>(rows), shape_.positions);
    for (std::size_t i = 0; i < rows; ++i) references_.emplace_back(model_.host);
    previous_.resize(rows);
    position_.resize(rows);
  }

  // The one row becomes `rows`.
  void fork(std::size_t rows) {
    cache_ = cache_->copy(std::vector<std::int64_t>(rows), position_[0], shape_.positions);
    std::vector<Reference> copies(rows, references_[0]);
    references_.swap(copies);
    previous_.assign(rows, previous_[0]);
    position_.assign(rows, position_[0]);
  }

  void go_back(std::int64_t position) {
    for (Reference& reference : references_) {
      for (auto* part : {&reference.keys, &reference.values}) {
        for (auto& layer : *part) layer.resize(static_cast<std::size_t>(position));
      }
    }
    position_.assign(position_.size(), position);
  }

  // Feeds `length` tokens to each of `count` rows from `row` on; the largest error of their logits, of all columns or
  // of the last alone.
  double feed(std::size_t row, std::size_t count, std::int64_t length, bool all) {
    const auto ids = draw(count * static_cast<std::size_t>(length));
    std::vector<std::int64_t> kept(all ? static_cast<std::size_t>(length) : 1, length - 1);
    if (all) std::iota(kept.begin(), kept.end(), std::int64_t{0});
    const Step step{.input_ids = ids,
                    .prev_ids = std::span(previous_).subspan(row, count),
                    .position = std::span(position_).subspan(row, count),
                    .logits_to_keep = kept,
                    .batch = static_cast<std::int64_t>(count),
                    .length = length};
    const std::vector<float> got = logits_of(step, row);
    for (int i = 0; i < 2 && length == 1; ++i) {  // again, as a graph, it must be the same to the bit
      if (logits_of(step, row) != got) return std::numeric_limits<double>::infinity();
    }
    return worst_of(row, count, length, ids, kept, got);
  }

  // The kernel that decodes goes on from what was fed: `length` tokens of each row; the largest error.
  double decode(std::int64_t length) {
    double worst = 0;
    for (std::size_t row = 0; row < references_.size(); ++row) {
      const auto ids = draw(static_cast<std::size_t>(length));
      const std::vector<int> narrow(ids.begin(), ids.end());
      const DeviceArray<int> forced{std::span<const int>(narrow)};
      const DecodeState state{narrow[0], static_cast<int>(previous_[row]), static_cast<int>(position_[row])};
      decoder_.set_states({&state, 1}, nullptr);
      decoder_.run(length, 1, forced.data(), rows_from(row), nullptr);
      check(cudaDeviceSynchronize(), "decoding");
      std::vector<float> got(static_cast<std::size_t>(shape_.vocab));
      check(cudaMemcpy(got.data(), decoder_.logits(), got.size() * 4, cudaMemcpyDeviceToHost), "reading logits");
      Reference::Vector wanted;
      for (const std::int64_t id : ids) wanted = advance(row, id);
      worst = larger(worst, difference(got, wanted));
    }
    return worst;
  }

 private:
  static double larger(double a, double b) { return b < a ? a : b; }  // NaN is larger

  CardCache& cache() { return static_cast<CardCache&>(*cache_); }
  DecoderCache rows_from(std::size_t row) {
    DecoderCache rows = cache().row(static_cast<std::int64_t>(row));
    if (claimed_ > 0) rows.shared = claimed_;
    return rows;
  }

  std::vector<float> logits_of(const Step& step, std::size_t row) {
    const auto kept = static_cast<std::size_t>(step.batch) * step.logits_to_keep.size();
    const DeviceArray<float> logits(kept * static_cast<std::size_t>(shape_.vocab));
    cache().will_write(*std::ranges::min_element(step.position));
    pass_.step(step, rows_from(row), logits.data(), stream_.get());
    stream_.wait("computing");
    std::vector<float> out(logits.size());
    check(cudaMemcpy(out.data(), logits.data(), out.size() * 4, cudaMemcpyDeviceToHost), "reading logits");
    return out;
  }

  std::vector<std::int64_t> draw(std::size_t count) {
    std::vector<std::int64_t> ids(count);
    for (auto& id : ids) id = static_cast<std::int64_t>(random_() % static_cast<unsigned>(shape_.vocab));
    return ids;
  }

  Reference::Vector advance(std::size_t row, std::int64_t id) {
    auto logits = references_[row].step(id, previous_[row]);
    previous_[row] = id;
    ++position_[row];
    return logits;
  }

  double worst_of(std::size_t row, std::size_t count, std::int64_t length, const std::vector<std::int64_t>& ids,
                  const std::vector<std::int64_t>& kept, const std::vector<float>& got) {
    const auto vocab = static_cast<std::size_t>(shape_.vocab);
    double worst = 0;
    std::size_t next = 0;
    for (std::size_t r = 0; r < count; ++r) {
      for (std::int64_t i = 0; i < length; ++i) {
        const auto wanted = advance(row + r, ids[r * static_cast<std::size_t>(length) + static_cast<std::size_t>(i)]);
        if (kept.size() == 1 && i != kept[0]) continue;
        worst = larger(worst, difference(std::span(got).subspan(next++ * vocab, vocab), wanted));
      }
    }
    return worst;
  }

  RandomShape shape_;
  RandomModel model_;
  ForwardPass pass_;
  Decoder decoder_;
  std::unique_ptr<Cache> cache_;
  std::int64_t claimed_;
  Stream stream_;
  std::vector<Reference> references_;
  std::vector<std::int64_t> previous_, position_;
  std::mt19937 random_{11};
};

double error_of(const Scenario& scenario, bool spoil) {
  Both both(scenario, spoil);
  double worst = 0;
  const auto take = [&worst](double error) {
    if (!(error <= worst)) worst = error;
  };
  if (scenario.prompt > 0) {
    take(both.feed(0, 1, scenario.prompt, false));
    both.fork(scenario.first.size());
  }
  for (std::size_t row = 0; row < scenario.first.size(); ++row) {
    if (scenario.first[row] > 0) take(both.feed(row, 1, scenario.first[row], row % 2 == 0));
  }
  const auto steps = [&] {
    for (std::size_t i = 0; i < scenario.steps.size(); ++i) {
      take(both.feed(0, scenario.first.size(), scenario.steps[i], i % 2 == 0));
    }
  };
  steps();
  if (scenario.back > 0) {
    both.go_back(scenario.back);
    steps();
  }
  // In 8 and 4 bits the kernel that decodes has other weights than passes have: decode_bench checks it.
  if (!scenario.shape.rounded) take(both.decode(3));
  return worst;
}

bool check_all() {
  const RandomShape tiny{5, 256, 2, 2, 512, 512, 40};
  std::vector<std::int64_t> staggered(64);
  for (std::size_t i = 0; i < staggered.size(); ++i) staggered[i] = static_cast<std::int64_t>(i);
  std::vector<std::int64_t> uneven(20);
  for (std::size_t i = 0; i < uneven.size(); ++i) uneven[i] = static_cast<std::int64_t>(i * 37 % 190);
  std::vector<Scenario> scenarios{
      {"one row, all lengths", tiny, 2048, {1}, {1, 2, 5, 8, 9, 15, 17, 64, 65, 1, 127, 1}},
      {"passes of 33 tokens, windows of 40", tiny, 33, {100}, {1, 34, 77, 3}},
      {"three ragged rows", tiny, 2048, {1, 200, 63}, {1, 1, 1, 19, 1, 5, 130, 1, 1, 1}},
      {"three ragged rows, passes of 40", tiny, 40, {1, 90, 63}, {1, 19, 50, 1, 1}},
      {"64 ragged rows", tiny, 2048, staggered, {1, 1, 1, 2}},
      {"300 rows", {3, 256, 2, 2, 512, 64, 16}, 512, std::vector<std::int64_t>(300), {2, 1, 1, 1}},
      {"12 rows", tiny, 2048, std::vector<std::int64_t>(staggered.begin(), staggered.begin() + 12), {1, 1, 1}},
      {"generation classic, 30 rows",
       {3, 512, 4, 4, 1024, 64, 0, true},
       2048,
       std::vector<std::int64_t>(30),
       {1, 1, 1}},
      {"generation classic", {3, 512, 4, 4, 1024, 512, 0, true}, 2048, {150, 3}, {1, 1, 1, 200}},
      {"grouped heads", {4, 768, 6, 2, 1000, 512, 130}, 2048, {150, 3}, {1, 1, 1, 240, 7}},
      {"widest", {2, 2048, 16, 16, 2048, 512, 130}, 2048, {1, 20}, {1, 70}},
      {"grouped heads, 64 rows", {3, 1280, 10, 5, 1500, 64, 16}, 2048, std::vector<std::int64_t>(64), {1, 1}},
      {"widest, 64 rows", {2, 2048, 16, 16, 2048, 64, 16}, 2048, std::vector<std::int64_t>(64), {1, 1}},
      {"d20", {20, 1280, 10, 10, 32768, 128, 16}, 2048, {40}, {3, 1}},
      {"d20, 33 rows", {20, 1280, 10, 10, 32768, 128, 16}, 2048, std::vector<std::int64_t>(33), {1, 1}},
      // Prompts are longer than windows, which for some rows begin behind them.
      {"64 samples of one prompt", tiny, 2048, staggered, {1, 1, 1, 2, 1}, 150},
      {"40 samples that go back", tiny, 2048, std::vector<std::int64_t>(40), {1, 1}, 150, 70},
      {"grouped heads, 20 samples", {4, 768, 6, 2, 1000, 512, 130}, 2048, uneven, {1, 1, 1}, 300},
      {"grouped heads, 20 samples of 850", {2, 1280, 10, 5, 1300, 1100, 300}, 2048, uneven, {1, 1}, 850},
      {"generation classic, 33 samples",
       {3, 512, 4, 4, 1024, 512, 0, true},
       2048,
       std::vector<std::int64_t>(33),
       {1, 1, 1},
       331},
      {"300 samples", {3, 256, 2, 2, 512, 128, 16}, 512, std::vector<std::int64_t>(300), {1, 1, 1}, 70},
  };
  for (const int bits : {8, 4}) {
    RandomShape small = tiny, large{20, 1280, 10, 10, 32768, 128, 16};
    small.bits = large.bits = bits;
    small.rounded = large.rounded = true;
    const bool is_int8 = bits == 8;
    scenarios.push_back({is_int8 ? "three ragged rows in 8 bits" : "three ragged rows in 4 bits",
                         small,
                         2048,
                         {1, 200, 63},
                         {1, 1, 1, 19, 1, 5, 130, 1, 1, 1}});
    scenarios.push_back({is_int8 ? "d20 in 8 bits" : "d20 in 4 bits", large, 2048, {40}, {3, 1}});
  }
  bool good = true;
  for (const Scenario& scenario : scenarios) {
    const double error = error_of(scenario, false);
    std::printf("%s: relative error %.3g (allowed %.3g)\n", scenario.name, error, kAllowed);
    good = good && error <= kAllowed;
  }
  const double spoilt = error_of({"", tiny, 2048, {30}, {1}}, true);
  std::printf("a reference without smear is told apart: relative error %.3g\n", spoilt);
  const double taken = error_of({"", tiny, 2048, std::vector<std::int64_t>(60, 60), {1}, 0, 0, 60}, false);
  std::printf("rows of their own taken for samples are told apart: relative error %.3g\n", taken);
  return good && spoilt > kAllowed && taken > kAllowed;
}

double middle(const std::vector<double>& sorted) { return sorted[sorted.size() / 2]; }

// Operations a second of a large product of bfloat16, of random numbers as weights are.
double matrix_rate() {
  constexpr std::int64_t kSize = 8192;
  std::vector<std::uint16_t> values(kSize * kSize);
  std::uint32_t state = 1;
  for (auto& value : values) {
    state = state * 1664525U + 1013904223U;
    value = to_bfloat16(static_cast<float>(state >> 8U) * 0x1p-24F - 0.5F);
  }
  const DeviceArray<std::uint16_t> a{std::span<const std::uint16_t>(values)}, out(values.size());
  Matmul matmul;
  const Stream stream;
  const auto times = times_of(20, [&] {
    matmul.multiply(a.data(), a.data(), out.data(), Matmul::Output::bfloat16, kSize, kSize, kSize, stream.get());
  });
  return 2.0 * kSize * kSize * kSize / middle(times);
}

constexpr RandomShape kD12{12, 768, 6, 6, 32768, 2048, 512}, kD20{20, 1280, 10, 10, 32768, 2048, 512};

double weights_of_layers(const RandomShape& s) {
  const auto c = static_cast<double>(s.n_embd);
  return static_cast<double>(s.n_layer) * c * (static_cast<double>(s.n_head + 2 * s.n_kv_head) * 128 + 9 * c);
}

// Keys that queries at positions begin <= position < end see, summed over layers.
double keys_seen(const DecoderModel& model, std::int64_t begin, std::int64_t end) {
  double seen = 0;
  for (const DecoderLayer& layer : model.layers) {
    for (std::int64_t i = begin; i < end; ++i) {
      seen += static_cast<double>(layer.window < 0 ? i + 1 : std::min(i + 1, layer.window + 1));
    }
  }
  return seen;
}

std::size_t free_bytes() {
  std::size_t free = 0, all = 0;
  check(cudaMemGetInfo(&free, &all), "asking for free memory");
  return free;
}

// One card's model with room for `rows` sequences.
struct Loaded {
  RandomShape shape;
  RandomModel model;
  ForwardPass pass;
  CardCache cache;
  DeviceArray<float> logits;
  Stream stream;

  Loaded(const RandomShape& s, std::int64_t rows)
      : shape(s),
        model(random_model(s, 3)),
        pass(model.card),
        cache(s.n_layer, s.n_kv_head, rows, s.positions),
        logits(static_cast<std::size_t>(rows * s.vocab)) {
    fill(model.card, cache);
  }

  void step(std::int64_t rows, std::int64_t length, std::int64_t position) {
    step(cache.row(0), rows, length, position);
  }
  void step(const DecoderCache& first, std::int64_t rows, std::int64_t length, std::int64_t position) {
    std::vector<std::int64_t> ids(static_cast<std::size_t>(rows * length));
    for (std::size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<std::int64_t>(i * 7919 % 32000);
    const std::vector<std::int64_t> previous(static_cast<std::size_t>(rows), 5);
    const std::vector<std::int64_t> positions(static_cast<std::size_t>(rows), position);
    const std::int64_t last = length - 1;
    pass.step({.input_ids = ids,
               .prev_ids = previous,
               .position = positions,
               .logits_to_keep = {&last, 1},
               .batch = rows,
               .length = length},
              first, logits.data(), stream.get());
  }
};

// What a pass takes of the card besides weights and cache, once its kernels have run.
void memory_taken(Loaded& loaded) {
  const std::size_t before = free_bytes();
  ForwardPass pass(loaded.model.card);
  const std::size_t taken = before - free_bytes();
  const double weights =
      2 * (weights_of_layers(loaded.shape) + 2.0 * static_cast<double>(loaded.shape.vocab * loaded.shape.n_embd));
  std::printf("d%ld passes take %.0f MB of the card, %.1f %% of what matrices and wte do\n", loaded.shape.n_layer,
              static_cast<double>(taken) / 1e6, 100 * static_cast<double>(taken) / weights);
}

void prompt_speed(Loaded& loaded, double rate) {
  const RandomShape& s = loaded.shape;
  for (const std::int64_t length : {1, 16, 128, 256, 512, 1024, 2048}) {
    const auto times = times_of(10, [&] { loaded.step(1, length, 0); });
    const double operations = 2 * weights_of_layers(s) * static_cast<double>(length) +
                              2.0 * static_cast<double>(s.vocab * s.n_embd) +
                              4.0 * static_cast<double>(s.n_embd) * keys_seen(loaded.model.card, 0, length);
    std::printf(
        "d%ld prompt of %4ld: %.0f tokens/s (%.0f to %.0f), %.3f ms, %.1f TFLOP/s, %.1f %% of the matrix rate\n",
        s.n_layer, length, static_cast<double>(length) / middle(times), static_cast<double>(length) / times.back(),
        static_cast<double>(length) / times.front(), 1e3 * middle(times), operations / middle(times) / 1e12,
        100 * operations / middle(times) / rate);
  }
}

// Tokens a second of the kernel that decodes one row, steps of one token.
double one_row_rate(Loaded& loaded, std::int64_t context) {
  Decoder decoder(loaded.model.card);
  const auto times = times_of(20, [&] {
    const DecodeState state{17, 3, static_cast<int>(context)};
    decoder.set_states({&state, 1}, loaded.stream.get());
    decoder.run(8, 1, nullptr, loaded.cache.row(0), loaded.stream.get());
  });
  return 8 / middle(times);
}

// Steps of rows behind `context` tokens, the first `alike` of which are the same in all of them.
void step_speed(Loaded& loaded, const std::string& what, const DecoderCache& cache, std::int64_t rows,
                std::int64_t context, std::int64_t alike, double bandwidth) {
  constexpr int kSteps = 8;
  const RandomShape& s = loaded.shape;
  const double one = one_row_rate(loaded, context);
  const auto times = times_of(10, [&] {
    for (int i = 0; i < kSteps; ++i) loaded.step(cache, rows, 1, context + i);
  });
  const double rate = static_cast<double>(rows * kSteps) / middle(times);
  const auto keys_of = [&](std::int64_t position) { return keys_seen(loaded.model.card, position, position + 1); };
  const std::int64_t position = context + kSteps / 2;
  const double own = keys_of(position - alike), keys = static_cast<double>(rows) * own + (keys_of(position) - own);
  const double weights = 2 * (weights_of_layers(s) + static_cast<double>(s.vocab * s.n_embd));
  const double floor = (weights + static_cast<double>(s.n_kv_head) * 128 * 4 * keys) / bandwidth;
  std::printf(
      "d%ld %2ld %s, context %4ld: %.0f tokens/s (%.0f to %.0f), %.1f us a step, %.1f x one row's %.0f; weights "
      "and cache take %.1f us to read (%.1f %%), which allows %.1f x\n",
      s.n_layer, rows, what.c_str(), context, rate, static_cast<double>(rows * kSteps) / times.back(),
      static_cast<double>(rows * kSteps) / times.front(), 1e6 * middle(times) / kSteps, rate / one, one, 1e6 * floor,
      100 * floor * kSteps / middle(times), static_cast<double>(rows) / floor / one);
}

void batch_speed(Loaded& loaded, double bandwidth) {
  for (const std::int64_t context : {1, 128, 256, 512, 1900}) {
    for (const std::int64_t rows : {2, 4, 8, 16, 32, 64}) {
      if (rows > loaded.cache.rows() || (rows < 64 && context != 512)) continue;
      step_speed(loaded, "rows", loaded.cache.row(0), rows, context, 0, bandwidth);
    }
  }
}

// Rows that are copies of one as far as a prompt goes.
void samples_speed(Loaded& loaded, double bandwidth) {
  struct Case {
    std::int64_t rows, prompt, behind;
  };
  for (const auto& [rows, prompt, behind] :
       {Case{4, 512, 0}, Case{8, 512, 0}, Case{16, 512, 0}, Case{64, 512, 0}, Case{64, 512, 128}, Case{64, 1900, 0}}) {
    const std::vector<std::int64_t> source(static_cast<std::size_t>(rows));
    const auto samples = loaded.cache.copy(source, prompt, prompt + behind + 64);
    step_speed(loaded, behind > 0 ? "samples of one prompt of " + std::to_string(prompt) : "samples of one prompt",
               static_cast<const CardCache&>(*samples).row(0), rows, prompt + behind, prompt, bandwidth);
  }
}

int main_of(std::string_view part) {
  if (part == "once") {
    Loaded loaded(kD20, 64);
    for (int i = 0; i < 2; ++i) loaded.step(1, 2048, 0);
    loaded.step(64, 1, 512);
    loaded.stream.wait("computing");
    return 0;
  }
  if (part != "speed" && !check_all()) {
    std::printf("error: a pass over many tokens is wrong\n");
    return 1;
  }
  const double rate = matrix_rate(), bandwidth = read_bandwidth();
  std::printf("matrix rate %.1f TFLOP/s, read bandwidth %.1f GB/s\n", rate / 1e12, bandwidth / 1e9);
  {
    Loaded small(kD12, 1);
    prompt_speed(small, rate);
  }
  Loaded large(kD20, 64);
  prompt_speed(large, rate);
  memory_taken(large);
  batch_speed(large, bandwidth);
  samples_speed(large, bandwidth);
  return 0;
}

}  // namespace
}  // namespace nanochat_x::cuda

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  try {
    return nanochat_x::cuda::main_of(argc > 1 ? argv[1] : "");
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
    return 1;
  }
}
