// The decode kernel against float64 on the CPU, then its speed beside the card's read bandwidth. Exit code 1 if it is
// wrong.
//
//   decode_bench          all of it
//   decode_bench speed    without the checks

#include <algorithm>
#include <cstdio>
#include <random>
#include <string>
#include <string_view>

#include "measuring.cuh"
#include "random_model.h"

namespace nanochat_x::cuda {
namespace {

struct Sequence {
  DeviceArray<std::uint16_t> keys, values;
  DecoderCache cache{};
  Sequence(const DecoderModel& m, std::int64_t capacity, std::int64_t rows)
      : keys(m.layers.size() * static_cast<std::size_t>(rows * m.n_kv_head * capacity * 128)), values(keys.size()) {
    cache = {keys.data(), values.data(), rows, capacity};
  }
};

std::vector<float> logits_of(const Decoder& decoder, std::int64_t row, std::int64_t vocab) {
  std::vector<float> logits(static_cast<std::size_t>(vocab));
  check(cudaMemcpy(logits.data(), decoder.logits() + row * vocab, logits.size() * 4, cudaMemcpyDeviceToHost),
        "reading logits");
  return logits;
}

// A row of the kernel and what it is held to.
struct Row {
  Reference reference;
  int previous = 0, position = 0;
};

// Feeds random tokens in runs of several lengths, to each row others; the largest relative error of the logits after
// each run. The i-th run has rows from the 0th to the (i % rows)-th, counted from the last: rows are at positions of
// their own. `spoil`: the reference lacks smear, and must not agree.
double check_model(const RandomShape& shape, const std::vector<int>& runs, std::uint64_t seed, bool spoil,
                   std::int64_t rows = 1) {
  RandomModel model = random_model(shape, seed);
  if (spoil) model.host.smear_lambda = 0;
  Decoder decoder(model.card);
  Sequence sequence(model.card, shape.positions, rows);
  std::vector<Row> all;
  for (std::int64_t i = 0; i < rows; ++i) all.push_back({Reference(model.host)});
  std::mt19937 random(static_cast<unsigned>(seed));
  double worst = 0;
  for (std::size_t turn = 0; turn < runs.size(); ++turn) {
    const int run = runs[turn];
    const std::int64_t here = rows - static_cast<std::int64_t>(turn) % rows;
    std::vector<int> ids(static_cast<std::size_t>(run * here));
    for (int& id : ids) id = static_cast<int>(random() % static_cast<unsigned>(shape.vocab));
    const DeviceArray<int> forced{std::span<const int>(ids)};
    std::vector<DecodeState> states;
    for (std::int64_t i = 0; i < here; ++i) {
      const Row& row = all[static_cast<std::size_t>(i)];
      states.push_back({ids[static_cast<std::size_t>(i)], row.previous, row.position});
    }
    decoder.set_states(states, nullptr);
    decoder.run(run, here, forced.data(), sequence.cache, nullptr);
    check(cudaDeviceSynchronize(), "decoding");
    std::vector<int> drawn(ids.size());
    check(cudaMemcpy(drawn.data(), decoder.drawn(), drawn.size() * 4, cudaMemcpyDeviceToHost), "reading tokens");
    for (std::int64_t i = 0; i < here; ++i) {
      Row& row = all[static_cast<std::size_t>(i)];
      Reference::Vector wanted;
      for (std::size_t at = static_cast<std::size_t>(i); at < ids.size(); at += static_cast<std::size_t>(here)) {
        wanted = row.reference.step(ids[at], row.previous);
        row.previous = ids[at];
      }
      row.position += run;
      const auto logits = logits_of(decoder, i, shape.vocab);
      const double error = difference(logits, wanted);
      if (!(error < worst)) worst = error;
      const auto best = std::max_element(logits.begin(), logits.end()) - logits.begin();
      const int got = drawn[static_cast<std::size_t>((run - 1) * here + i)];
      if (got != best) throw Error("token " + std::to_string(got) + " was drawn, not " + std::to_string(best));
    }
  }
  return worst;
}

void speed(const RandomShape& shape, double bandwidth, std::int64_t most_rows = 1) {
  const RandomModel model = random_model(shape, 3);
  Decoder decoder(model.card);
  Sequence sequence(model.card, shape.positions, most_rows);
  // any keys and values
  std::vector<std::uint16_t> noise(sequence.keys.size());
  for (std::size_t i = 0; i < noise.size(); ++i) noise[i] = to_bfloat16(std::sin(static_cast<float>(i % 10007)));
  check(cudaMemcpy(sequence.keys.data(), noise.data(), noise.size() * 2, cudaMemcpyHostToDevice), "copy");
  check(cudaMemcpy(sequence.values.data(), noise.data(), noise.size() * 2, cudaMemcpyHostToDevice), "copy");
  const double layer_rows =
      static_cast<double>(shape.n_head + 2 * shape.n_kv_head) * 128 + 9.0 * static_cast<double>(shape.n_embd);
  // Of a quantised weight with its share of a scale and a zero.
  const double weight_bits = shape.bits == 16 ? 16 : shape.bits + (shape.bits == 8 ? 16.0 : 24.0) / 32;
  const double bytes = weight_bits / 8 * static_cast<double>(shape.n_embd) *
                       (static_cast<double>(shape.n_layer) * layer_rows + static_cast<double>(shape.vocab));
  const std::string format = shape.bits == 16 ? "" : " int" + std::to_string(shape.bits);
  for (const int context : {1, 512, 1900}) {
    if (context + 64 > shape.positions) continue;
    const std::vector<DecodeState> states(static_cast<std::size_t>(most_rows), {17, 3, context});
    const auto times_for = [&](int steps, std::int64_t rows) {
      return times_of(20, [&] {
        decoder.set_states(states, nullptr);
        decoder.run(steps, rows, nullptr, sequence.cache, nullptr);
      });
    };
    for (std::int64_t rows = 2; rows <= std::min(most_rows, decoder.most_rows()); ++rows) {
      const auto times = times_for(64, rows);
      const double step = times[times.size() / 2] / 64;
      std::printf("d%ld%s context %4d, %ld rows, 64 steps a launch: %.1f tokens/s, %.1f us a step\n", shape.n_layer,
                  format.c_str(), context, rows, static_cast<double>(rows) / step, 1e6 * step);
    }
    for (const int steps : {1, 8, 64}) {
      const auto times = times_for(steps, 1);
      const double rate = steps / times[times.size() / 2];
      std::printf(
          "d%ld%s context %4d, %2d steps a launch: %.1f tokens/s (%.1f to %.1f), %.1f us a step, %.1f %% of read\n",
          shape.n_layer, format.c_str(), context, steps, rate, steps / times.back(), steps / times.front(), 1e6 / rate,
          100 * rate * bytes / bandwidth);
    }
  }
}

// False if the kernel is wrong.
bool check_one(const char* name, const RandomShape& shape, const std::vector<int>& runs, std::uint64_t seed,
               std::int64_t rows = 1) {
  const double error = check_model(shape, runs, seed, false, rows);
  std::printf("%s: relative error %.3g (allowed %.3g)\n", name, error, kAllowed);
  return error <= kAllowed;
}

bool check_all() {
  bool good = check_one("tiny", {5, 256, 2, 2, 512, 512, 40}, {1, 1, 2, 5, 30, 1, 100, 160, 7, 1, 100}, 1);
  good = check_one("generation classic", {3, 512, 4, 4, 1024, 512, 0, true}, {1, 3, 150, 1, 200}, 2) && good;
  good = check_one("grouped heads", {4, 768, 6, 2, 1000, 512, 130}, {1, 3, 150, 1, 240, 1}, 3) && good;
  good = check_one("wide", {2, 1664, 13, 13, 2048, 512, 130}, {1, 3, 20}, 4) && good;
  good = check_one("widest", {2, 2048, 16, 16, 2048, 512, 130}, {1, 3, 20}, 6) && good;
  good = check_one("d20", {20, 1280, 10, 10, 32768, 64, 16}, {1, 2, 3}, 5) && good;
  for (const int bits : {8, 4}) {
    const std::string name = " in " + std::to_string(bits) + " bits";
    const auto check_format = [&](const char* model, RandomShape shape, const std::vector<int>& runs) {
      shape.bits = bits;
      good = check_one((model + name).c_str(), shape, runs, 11) && good;
    };
    check_format("tiny", {5, 256, 2, 2, 512, 512, 40}, {1, 1, 2, 5, 30, 1, 100, 160});
    check_format("generation classic", {3, 512, 4, 4, 1024, 512, 0, true}, {1, 3, 150});
    check_format("grouped heads", {4, 768, 6, 2, 1000, 512, 130}, {1, 3, 150, 1});
    check_format("groups of 64", {2, 1664, 13, 13, 2048, 512, 130, false, 16, 64}, {1, 3, 20});
    check_format("widest", {2, 2048, 16, 16, 2048, 512, 130}, {1, 3, 20});
    check_format("d20", {20, 1280, 10, 10, 32768, 64, 16}, {1, 2, 3});
  }
  for (const int bits : {16, 8, 4}) {
    const auto check_rows = [&](const char* model, RandomShape shape, const std::vector<int>& runs) {
      shape.bits = bits;
      const std::string name = std::string(model) + ", several rows, " + std::to_string(bits) + " bits";
      good = check_one(name.c_str(), shape, runs, 21, 4) && good;
    };
    check_rows("tiny", {5, 256, 2, 2, 512, 512, 40}, {1, 1, 2, 5, 30, 1, 100, 160, 7, 1});
    check_rows("generation classic", {3, 512, 4, 4, 1024, 512, 0, true}, {1, 3, 150, 2});
    check_rows("grouped heads", {4, 768, 6, 2, 1000, 512, 130}, {1, 3, 150, 1, 40, 1});
    check_rows("d20", {20, 1280, 10, 10, 32768, 64, 16}, {1, 1, 2, 2, 1});
  }
  for (const int bits : {16, 8, 4}) {
    RandomShape tiny{5, 256, 2, 2, 512, 512, 40};
    tiny.bits = bits;
    for (const std::int64_t rows : {1, 4}) {
      const double spoilt = check_model(tiny, {1, 30}, 1, true, rows);
      std::printf("a reference without smear is told apart in %d bits, %ld rows: relative error %.3g\n", bits, rows,
                  spoilt);
      good = good && spoilt > kAllowed;
    }
  }
  return good;
}

int main_of(bool checks) {
  cudaDeviceProp properties{};
  check(cudaGetDeviceProperties(&properties, 0), "asking for the device");
  std::printf("%s, %d multiprocessors\n", properties.name, properties.multiProcessorCount);
  if (checks && !check_all()) {
    std::printf("error: the decode kernel is wrong\n");
    return 1;
  }
  const double bandwidth = read_bandwidth();
  std::printf("read bandwidth %.1f GB/s\n", bandwidth / 1e9);
  speed({12, 768, 6, 6, 32768, 2048, 512}, bandwidth);
  for (const int bits : {16, 8, 4}) {
    RandomShape d20{20, 1280, 10, 10, 32768, 2048, 512};
    d20.bits = bits;
    speed(d20, bandwidth, 4);
  }
  return 0;
}

}  // namespace
}  // namespace nanochat_x::cuda

int main(int argc, char** argv) {
  std::setvbuf(stdout, nullptr, _IOLBF, 0);
  try {
    return nanochat_x::cuda::main_of(argc < 2 || std::string_view(argv[1]) != "speed");
  } catch (const std::exception& error) {
    std::printf("error: %s\n", error.what());
    return 1;
  }
}
