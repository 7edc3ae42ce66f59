// A run of layers as one call: one parallel region, the threads meeting between layers.
#pragma once

#include <memory>
#include <vector>

#include "layers.h"

namespace ddpm_fast::inference {

class Program {
 public:
  explicit Program(int64_t table_columns) : columns_(table_columns) {}
  void add(std::unique_ptr<Layer> layer) {
    layers_.push_back(std::move(layer));
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
  std::vector<std::unique_ptr<Layer>> layers_;
  int threads_ = 0;             // what the layers are cut for
  std::vector<int64_t> items_;  // of each layer
  std::vector<double> seconds_;
  std::vector<std::unique_ptr<char[]>> scratch_;  // one of each thread
};

}  // namespace ddpm_fast::inference
