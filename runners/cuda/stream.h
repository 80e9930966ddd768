#pragma once

#include <cuda_runtime_api.h>

#include <memory>

#include "check.h"

namespace nanochat_x::cuda {

/// Work of the card in order. It keeps order with the default stream too.
class Stream {
 public:
  /// Throws Error if the card is not there.
  Stream() {
    cudaStream_t made = nullptr;
    check(cudaStreamCreate(&made), "making a stream");
    stream_.reset(made);
  }

  cudaStream_t get() const { return stream_.get(); }
  /// Waits for all of it. Throws Error for what failed on the card since.
  void wait(const char* what) const { check(cudaStreamSynchronize(get()), what); }

 private:
  struct Destroy {
    void operator()(cudaStream_t stream) const { (void)cudaStreamDestroy(stream); }
  };
  std::unique_ptr<CUstream_st, Destroy> stream_;
};

/// What was captured from a stream, to be started as one.
class Graph {
 public:
  Graph() = default;
  /// What `work` puts on `stream`; none of it runs. Throws Error, also what `work` throws.
  template <typename Work>
  Graph(cudaStream_t stream, Work work) {
    check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal), "capturing a graph");
    try {
      work();
    } catch (...) {
      cudaGraph_t broken = nullptr;
      if (cudaStreamEndCapture(stream, &broken) == cudaSuccess) (void)cudaGraphDestroy(broken);
      throw;
    }
    cudaGraph_t captured = nullptr;
    check(cudaStreamEndCapture(stream, &captured), "capturing a graph");
    const std::unique_ptr<CUgraph_st, Destroy> owned(captured);
    cudaGraphExec_t made = nullptr;
    check(cudaGraphInstantiate(&made, captured, 0), "preparing a graph");
    exec_.reset(made);
  }

  explicit operator bool() const { return exec_ != nullptr; }
  void start(cudaStream_t stream) const { check(cudaGraphLaunch(exec_.get(), stream), "starting a graph"); }

 private:
  struct Destroy {
    void operator()(cudaGraph_t graph) const { (void)cudaGraphDestroy(graph); }
    void operator()(cudaGraphExec_t exec) const { (void)cudaGraphExecDestroy(exec); }
  };
  std::unique_ptr<CUgraphExec_st, Destroy> exec_;
};

}  // namespace nanochat_x::cuda
