// How fast the kernels are, in weights and bytes a second, beside how fast memory is read in the same run. Prints a
// table, then one line of JSON. Every kernel reads the same memory, `--mib` of it: far more than the caches hold gives
// what a large model gives, 1 gives what the core itself can do.

#include <CLI/CLI.hpp>
#include <algorithm>
#include <barrier>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "kernels.h"
#include "memory_speed.h"
#include "nanochat_x/error.h"
#include "spread.h"

namespace {

namespace kernels = nanochat_x::kernels;
using kernels::Type;
using nanochat_x::internal::MemorySpeed;
using nanochat_x::internal::spread_of;
using Json = nlohmann::json;

struct Options {
  int threads = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
  std::int64_t mib = 512, width = 2048, group = 64, repeats = 7;
  std::string only;
};

/// A kernel over rows [begin, end) of its matrix, or keys; the outputs of one thread are its own.
using Work = std::function<void(int thread, std::int64_t begin, std::int64_t end)>;

struct Case {
  std::string name;
  std::int64_t M;
  double bytes_a_row;
  double weights_a_row;
  Work work;
};

/// Seconds of one pass over all rows, each thread its own part: the median of `repeats`, after one that is not counted.
double seconds_of_pass(const Options& options, std::int64_t rows, std::int64_t passes, const Work& work) {
  std::barrier together(options.threads);
  std::vector<double> seconds;
  const auto run = [&](int thread) {
    const std::int64_t begin = rows * thread / options.threads, end = rows * (thread + 1) / options.threads;
    for (std::int64_t repeat = 0; repeat <= options.repeats; ++repeat) {
      together.arrive_and_wait();
      const auto began = std::chrono::steady_clock::now();
      for (std::int64_t pass = 0; pass < passes; ++pass) work(thread, begin, end);
      together.arrive_and_wait();
      const std::chrono::duration<double> took = std::chrono::steady_clock::now() - began;
      if (thread == 0 && repeat > 0) seconds.push_back(took.count() / static_cast<double>(passes));
    }
  };
  {
    std::vector<std::jthread> others;
    for (int i = 1; i < options.threads; ++i) others.emplace_back(run, i);
    run(0);
  }
  return spread_of(seconds).median;
}

constexpr std::int64_t kRowsOfPrompt = 512;

/// What all kernels read, with numbers that are normal in every format, and where they write.
struct Memory {
  std::vector<std::uint8_t> weights, zeros;
  std::vector<std::uint16_t> scales;
  std::vector<std::int32_t> starts;  // of compact rows without exceptions, none of which is shorter than a byte a value
  std::vector<float> x;
  std::vector<std::vector<float>> y;  // one a thread

  explicit Memory(const Options& options)
      : weights(static_cast<std::size_t>(options.mib) << 20, 0x3c),
        zeros(2 * weights.size() / static_cast<std::size_t>(options.group), 8),
        scales(zeros.size(), 0x3c3c),
        starts(weights.size() / static_cast<std::size_t>(options.width) + 2, 0),
        x(static_cast<std::size_t>(kRowsOfPrompt * options.width), 0.5F),
        y(static_cast<std::size_t>(options.threads)) {}
};

constexpr std::int64_t kRowsOfOutput = 64;  // of w at a time, so that what is written does not count

std::vector<Case> products(const Options& options, Memory& memory) {
  std::vector<Case> cases;
  const std::int64_t K = options.width, group = options.group;
  const auto in_blocks = [&memory](std::int64_t M, auto call) {
    return [&memory, M, call](int thread, std::int64_t begin, std::int64_t end) {
      std::vector<float>& y = memory.y[static_cast<std::size_t>(thread)];
      y.resize(static_cast<std::size_t>(M * kRowsOfOutput));
      for (std::int64_t row = begin; row < end; row += kRowsOfOutput) {
        call(M, y.data() - row, row, std::min(end, row + kRowsOfOutput));
      }
    };
  };
  for (const std::int64_t M : {1, 2, 4, 8, 16}) {
    const auto width = static_cast<double>(K);
    const auto add = [&](const char* name, double bytes, auto call) {
      cases.push_back({name, M, bytes * width, width, in_blocks(M, call)});
    };
    const float* x = memory.x.data();
    const std::uint8_t* w = memory.weights.data();
    for (const auto& [name, type] : {std::pair("float32", Type::float32), std::pair("bfloat16", Type::bfloat16),
                                     std::pair("float16", Type::float16)}) {
      add(name, type == Type::float32 ? 4 : 2, [=](std::int64_t m, float* y, std::int64_t begin, std::int64_t end) {
        kernels::linear(x, m, K, w, type, y, kRowsOfOutput, begin, end);
      });
    }
    if (K % kernels::kCompactBlock == 0) {
      const kernels::Compact compact{K, w, w, memory.starts.data(), nullptr, nullptr, 0};
      add("compact float32", 3.5, [=](std::int64_t m, float* y, std::int64_t begin, std::int64_t end) {
        kernels::linear_compact(x, m, compact, y, kRowsOfOutput, begin, end);
      });
    }
    const std::uint16_t* scales = memory.scales.data();
    const std::uint8_t* zeros = memory.zeros.data();
    const auto a_group = static_cast<double>(group);
    add("int8", 1 + 2 / a_group, [=](std::int64_t m, float* y, std::int64_t begin, std::int64_t end) {
      const auto* q = reinterpret_cast<const std::int8_t*>(w);
      kernels::linear_int8(x, m, K, q, scales, group, y, kRowsOfOutput, begin, end);
    });
    add("int4", 0.5 + 3 / a_group, [=](std::int64_t m, float* y, std::int64_t begin, std::int64_t end) {
      kernels::linear_int4(x, m, K, w, scales, zeros, group, y, kRowsOfOutput, begin, end);
    });
    if (kernels::multiplies_bfloat16()) {
      add("bf16 x bfloat16", 2, [=](std::int64_t m, float* y, std::int64_t begin, std::int64_t end) {
        const auto* matrix = reinterpret_cast<const std::uint16_t*>(w);
        kernels::linear_bfloat16(matrix, m, K, matrix, y, kRowsOfOutput, begin, end);
      });
    }
    if (M > 1) continue;
    for (const auto& [layout, of] : {std::pair(kernels::QuantizedRow::Layout::words, "int16 x "),
                                     std::pair(kernels::QuantizedRow::Layout::bytes, "2 bytes x ")}) {
      const auto row_for = [&, how = layout](int bits) {
        return std::make_shared<const kernels::QuantizedRow>(x, K, group, bits, how);
      };
      if (kernels::QuantizedRow::takes(layout, 8, group)) {
        add((of + std::string("int8")).c_str(), 1 + 2 / a_group,
            [=, row = row_for(8)](std::int64_t, float* y, std::int64_t begin, std::int64_t end) {
              kernels::linear_int8(*row, reinterpret_cast<const std::int8_t*>(w), scales, y, begin, end);
            });
      }
      if (kernels::QuantizedRow::takes(layout, 4, group)) {
        add((of + std::string("int4")).c_str(), 0.5 + 3 / a_group,
            [=, row = row_for(4)](std::int64_t, float* y, std::int64_t begin, std::int64_t end) {
              kernels::linear_int4(*row, w, scales, zeros, y, begin, end);
            });
      }
    }
  }
  return cases;
}

/// With as many rows of x as a prompt has: bound by arithmetic.
std::vector<Case> prompts(const Options& options, Memory& memory) {
  constexpr std::int64_t kBlock = 8 * kernels::kPanelRows;  // rows of w at a time
  const std::int64_t K = options.width;
  std::vector<Case> cases;
  const auto add = [&](const std::string& name, double bytes, auto call) {
    const Work work = [&memory, call](int thread, std::int64_t begin, std::int64_t end) {
      std::vector<float>& y = memory.y[static_cast<std::size_t>(thread)];
      y.resize(static_cast<std::size_t>(kRowsOfPrompt * kBlock));
      for (; begin < end; begin += kBlock) call(y.data() - begin, begin, std::min(end, begin + kBlock));
    };
    cases.push_back({name, kRowsOfPrompt, bytes * static_cast<double>(K), static_cast<double>(K), work});
  };
  const float* x = memory.x.data();
  const std::uint8_t *w = memory.weights.data(), *zeros = memory.zeros.data();
  for (const auto& [name, type] :
       {std::pair("matmul float32", Type::float32), std::pair("matmul bfloat16", Type::bfloat16)}) {
    add(name, type == Type::float32 ? 4 : 2, [=, type = type](float* y, std::int64_t begin, std::int64_t end) {
      kernels::matmul(x, kRowsOfPrompt, K, w, type, y, kBlock, begin, end);
    });
  }
  if (!kernels::QuantizedRows::takes(options.group)) return cases;
  const auto rows = std::make_shared<kernels::QuantizedRows>(kRowsOfPrompt, K, options.group);
  rows->quantize(x, 0, kRowsOfPrompt);
  const std::uint16_t* scales = memory.scales.data();
  const auto a_group = static_cast<double>(options.group);
  add("matmul 2 bytes x int8", 1 + 2 / a_group, [=](float* y, std::int64_t begin, std::int64_t end) {
    kernels::matmul_int8(*rows, reinterpret_cast<const std::int8_t*>(w), scales, y, kBlock, begin, end);
  });
  add("matmul 2 bytes x int4", 0.5 + 3 / a_group, [=](float* y, std::int64_t begin, std::int64_t end) {
    kernels::matmul_int4(*rows, w, scales, zeros, y, kBlock, begin, end);
  });
  return cases;
}

std::vector<Case> widenings(const Options& options, Memory& memory) {
  std::vector<Case> cases;
  const std::int64_t K = options.width, group = options.group;
  const auto add = [&](const char* name, double bytes, auto call) {
    const Work work = [&memory, K, call](int thread, std::int64_t begin, std::int64_t end) {
      std::vector<float>& out = memory.y[static_cast<std::size_t>(thread)];
      out.resize(static_cast<std::size_t>(K * kRowsOfOutput));
      for (std::int64_t row = begin; row < end; row += kRowsOfOutput) {
        call(out.data(), row, std::min(end, row + kRowsOfOutput));
      }
    };
    cases.push_back({name, 0, bytes * static_cast<double>(K), static_cast<double>(K), work});
  };
  const std::uint8_t *w = memory.weights.data(), *zeros = memory.zeros.data();
  const std::uint16_t* scales = memory.scales.data();
  const auto a_group = static_cast<double>(group);
  add("widen int8", 1 + 2 / a_group, [=](float* out, std::int64_t begin, std::int64_t end) {
    kernels::widen_int8(K, reinterpret_cast<const std::int8_t*>(w), scales, group, out, begin, end);
  });
  add("widen int4", 0.5 + 3 / a_group, [=](float* out, std::int64_t begin, std::int64_t end) {
    kernels::widen_int4(K, w, scales, zeros, group, out, begin, end);
  });
  return cases;
}

/// Heads of width 128; a row is a key and its value.
std::vector<Case> attentions(Memory& memory) {
  static constexpr std::int64_t kWidth = 128, kKeys = 1024;
  std::vector<Case> cases;
  for (const auto& [name, type] :
       {std::pair("attend float32", Type::float32), std::pair("attend bfloat16", Type::bfloat16),
        std::pair("attend float16", Type::float16)}) {
    for (const std::int64_t heads : {1, 4}) {
      const std::int64_t bytes = (type == Type::float32 ? 4 : 2) * kWidth;
      const auto work = [&memory, bytes, heads, type = type](int thread, std::int64_t begin, std::int64_t end) {
        std::vector<float>& out = memory.y[static_cast<std::size_t>(thread)];
        out.resize(static_cast<std::size_t>(heads * kWidth));
        for (std::int64_t key = begin; key < end; key += kKeys) {
          const std::int64_t count = std::min(kKeys, end - key);
          const std::uint8_t* k = memory.weights.data() + 2 * key * bytes;
          const kernels::Run run{k, k + count * bytes, count};
          kernels::attend(memory.x.data(), kWidth, heads, kWidth, 0.088F, {&run, 1}, type, out.data(), kWidth);
        }
      };
      const auto both = static_cast<double>(2 * kWidth);
      cases.push_back({name, heads, static_cast<double>(2 * bytes), both, work});
    }
  }
  return cases;
}

void measure(const Options& options) {
  Memory memory(options);
  std::vector<Case> cases = products(options, memory);
  std::ranges::move(prompts(options, memory), std::back_inserter(cases));
  std::ranges::move(widenings(options, memory), std::back_inserter(cases));
  if (options.width >= 32) std::ranges::move(attentions(memory), std::back_inserter(cases));  // (q is x)
  std::vector<double> speeds;
  MemorySpeed reading(options.threads);
  for (int i = 0; i < 5; ++i) speeds.push_back(reading.measure());
  const double read = spread_of(speeds).median;
  std::printf("%s, %d threads, rows of %lld, groups of %lld, %lld MiB; memory is read at %.1f GB/s\n",
              kernels::instruction_set().c_str(), options.threads, static_cast<long long>(options.width),
              static_cast<long long>(options.group), static_cast<long long>(options.mib), read / 1e9);
  std::printf("%-16s %3s %14s %8s %10s\n", "kernel", "M", "G weights/s", "GB/s", "of memory");
  Json results = Json::array();
  for (const Case& one : cases) {
    if (!options.only.empty() && one.name.find(options.only) == std::string::npos) continue;
    const double weight_bytes = one.name.ends_with("int4")   ? one.weights_a_row / 2
                                : one.name.ends_with("int8") ? one.weights_a_row
                                                             : one.bytes_a_row;
    const auto rows = static_cast<std::int64_t>(static_cast<double>(memory.weights.size()) / weight_bytes);
    if (rows < options.threads) continue;
    const std::int64_t passes = std::max<std::int64_t>(1, 64 / options.mib);
    const double seconds = seconds_of_pass(options, rows, passes, one.work);
    const double weights = one.weights_a_row * static_cast<double>(rows) / seconds / 1e9;
    const double bytes = one.bytes_a_row * static_cast<double>(rows) / seconds;
    std::printf("%-16s %3lld %14.2f %8.2f %9.0f%%\n", one.name.c_str(), static_cast<long long>(one.M), weights,
                bytes / 1e9, 100 * bytes / read);
    std::fflush(stdout);
    results.push_back({{"kernel", one.name}, {"M", one.M}, {"gweights_s", weights}, {"gb_s", bytes / 1e9}});
  }
  std::puts(Json({{"instruction_set", kernels::instruction_set()},
                  {"threads", options.threads},
                  {"width", options.width},
                  {"group", options.group},
                  {"mib", options.mib},
                  {"read_gb_s", read / 1e9},
                  {"kernels", results}})
                .dump()
                .c_str());
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Measures the kernels beside how fast memory is read.", "kernel_bench");
  Options options;
  app.add_option("--threads", options.threads, "threads (default: one a core)")->check(CLI::Range(1, 1024));
  app.add_option("--mib", options.mib, "of weights; 1 stays in the caches (default: 512)")
      ->check(CLI::Range(1, 1 << 16));
  app.add_option("--width", options.width, "values in a row, a multiple of the group (default: 2048)")
      ->check(CLI::Range(16, 1 << 20));
  app.add_option("--group", options.group, "of quantised weights (default: 64)")->check(CLI::Range(16, 1 << 20));
  app.add_option("--repeats", options.repeats, "passes whose median is told (default: 7)")->check(CLI::Range(1, 1000));
  app.add_option("--only", options.only, "kernels whose name has this in it, as int4");
  try {
    app.parse(argc, argv);
    measure(options);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);
    std::fprintf(stderr, "kernel_bench: %s (see --help)\n", error.what());
    return 2;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "kernel_bench: %s\n", error.what());
    return 2;
  }
}
