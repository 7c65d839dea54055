// One problem with its operands and results, and what is expected of them.
#pragma once

#include <memory>
#include <string>

#include "workload.h"

namespace mmca::bench {

class Subject {
 public:
  virtual ~Subject() = default;
  virtual const Problem& problem() const = 0;  // of linear attention: as far as sizes, keys and values go
  // Runs the kernel once. What is wrong with its results; empty: nothing.
  virtual std::string faults(const Kernel& kernel, Executor& executor) = 0;
  virtual std::size_t compared() const = 0;  // numbers, by the last call

  double flops() const { return flops_; }
  std::int64_t key_bytes() const;  // of keys and values together
  virtual void run(const Kernel& kernel, Executor& executor) const {
    kernel.run(problem(), make_plan(problem()), executor);
  }

 protected:
  double flops_ = 0;
};

// Numbers that the operation sees: (head, row, key) triples of all sequences.
std::int64_t visible_pairs(const Problem& problem);

std::unique_ptr<Subject> make_subject(const Workload& workload, DType dtype, Operation operation);
std::unique_ptr<Subject> make_linear_subject(const Workload& workload, DType dtype, Operation operation);

}  // namespace mmca::bench
