// A run of layers as one call: one parallel region, the threads meeting between layers.
#pragma once

#include <memory>
#include <vector>

#include "layers.h"

namespace ddpm_fast::inference {

class Program {
 public:
  explicit Program(int64_t table_columns) : columns_(table_columns) {}
  // Layers added from now on call image `first` their image 0. One after the other for the first few images, then for
  // the next, they find what the layer before has written in the caches.
  void from_image(int64_t first) { first_ = first; }
  void add(std::unique_ptr<Layer> layer) {
    layers_.push_back(std::move(layer));
    firsts_.push_back(first_);
    scratch_.clear();  // it may need more
    threads_ = 0;
  }
  // Not for two threads at a time: the layers' buffers are one set.
  void run(Run run, int threads);
  // Seconds that each layer took in all runs so far.
  const std::vector<double>& seconds() const { return seconds_; }
  int64_t columns() const { return columns_; }

 private:
  const int64_t columns_;
  int64_t first_ = 0;
  std::vector<std::unique_ptr<Layer>> layers_;
  std::vector<int64_t> firsts_;  // of each layer
  int threads_ = 0;              // what the layers are cut for
  std::vector<int64_t> items_;   // of each layer
  std::vector<double> seconds_;
  std::vector<std::unique_ptr<char[]>> scratch_;  // one of each thread
};

}  // namespace ddpm_fast::inference
