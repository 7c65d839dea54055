// The operators on an emulated GPU: csrc/torch's own code and csrc/cuda's kernels for CPU tensors, in the place of the
// CPU's kernels for as long as a test wants it (emulated_device_enable; tests/emulated_device.py).
//
// A call sees device memory of its own. Inputs are copied element by element into memory that is NaN between and behind
// the elements, results and scratch memory begin as NaN, and each is registered with its exact extent.
#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <vector>

#include "cuda/run.h"
#include "emulator.h"
#include "torch/backend.h"
#include "torch/linear_ops.h"

namespace mmca {
namespace {

enum Access { read_only, read_and_write, write_first };  // emulation_register's

struct Axis {
  std::int64_t size, stride;
};
using Axes = std::vector<Axis>;

class DeviceMemory final : public cuda::Workspace {
 public:
  ~DeviceMemory() {
    for (void* p : registered_) emulation_unregister(p);
  }

  void* take(std::int64_t bytes) override {
    unsigned char* block = allocate(static_cast<std::size_t>(bytes), 0);
    return give(block, static_cast<std::size_t>(bytes), write_first, "workspace " + std::to_string(++taken_));
  }

  // A copy for kernels to read.
  const void* input(const char* name, const void* data, std::int64_t element_bytes, Axes axes) {
    if (!data) return nullptr;
    const std::size_t bytes = element_bytes * span(axes);
    unsigned char* copy = allocate(bytes, reinterpret_cast<std::uintptr_t>(data) % alignment);
    if (bytes) copy_elements(copy, static_cast<const unsigned char*>(data), element_bytes, axes, 0);
    return give(copy, bytes, read_only, name);
  }

  // The caller's own memory, dense. `sum`: added to, where it lies zero.
  void* result(const char* name, void* data, std::int64_t element_bytes, const Axes& axes, bool sum = false) {
    const std::size_t bytes = element_bytes * span(axes);
    if (!data) return nullptr;
    if (!sum) std::memset(data, 0xff, bytes);
    return give(data, bytes, sum ? read_and_write : write_first, name);
  }

 private:
  static constexpr std::size_t alignment = 256;

  // Elements from the first to the last.
  static std::int64_t span(const Axes& axes) {
    std::int64_t last = 0;
    for (const Axis& axis : axes) {
      if (axis.size == 0) return 0;
      last += (axis.size - 1) * axis.stride;
    }
    return last + 1;
  }

  static void copy_elements(unsigned char* to, const unsigned char* from, std::int64_t bytes, const Axes& axes,
                            std::size_t first) {
    if (first == axes.size()) {
      std::memcpy(to, from, bytes);
      return;
    }
    const Axis axis = axes[first];
    if (first + 1 == axes.size() && axis.stride == 1) {
      std::memcpy(to, from, axis.size * bytes);
      return;
    }
    for (std::int64_t i = 0; i < (axis.stride ? axis.size : 1); ++i) {
      const std::int64_t offset = i * axis.stride * bytes;
      copy_elements(to + offset, from + offset, bytes, axes, first + 1);
    }
  }

  // `remainder`: of the address, divided by `alignment`.
  unsigned char* allocate(std::size_t bytes, std::size_t remainder) {
    const std::size_t size = bytes + 2 * alignment;
    blocks_.push_back(std::make_unique<unsigned char[]>(size));
    std::memset(blocks_.back().get(), 0xff, size);
    const auto address = reinterpret_cast<std::uintptr_t>(blocks_.back().get());
    return blocks_.back().get() + (alignment - address % alignment) + remainder;
  }

  void* give(void* memory, std::size_t bytes, Access access, const std::string& name) {
    void* address = emulation_register(memory, bytes, access, name.c_str());
    TORCH_CHECK(address, "emulated device: ", emulation_last_error());
    if (bytes) registered_.push_back(memory);
    return address;
  }

  std::vector<std::unique_ptr<unsigned char[]>> blocks_;
  std::vector<void*> registered_;
  int taken_ = 0;
};

// Numbers of a row that may be read: cuda/run.h.
std::int64_t padded(DType dtype, std::int64_t dim) { return cuda::needs_aligned_rows(dtype) ? (dim + 7) / 8 * 8 : dim; }

// The problem with all its memory on the device.
class DeviceProblem {
 public:
  DeviceProblem(const Problem& problem, Operation operation, DeviceMemory& memory) : moved(problem), memory_(memory) {
    Problem& p = moved;
    const bool backward = operation == Operation::attention_backward;
    const std::int64_t tokens = p.q_offsets ? p.k_len : p.batch * p.k_len;
    statistic_bytes_ = p.dtype == DType::f64 ? 8 : 4;
    row("query", p.query, p.q_heads, p.q_len, p.head_dim);
    row("key", p.key, p.kv_heads, p.k_len, p.head_dim);
    row("value", p.value, p.kv_heads, p.k_len, p.value_dim);
    read("q_offsets", p.q_offsets, {{p.batch + 1, 1}});
    read("k_offsets", p.k_offsets, {{p.batch + 1, 1}});
    read("attn_mask", p.attn_mask.data, pairs(p.attn_mask));
    p.bias.data = memory_.input("bias", p.bias.data, element_size(p.bias_dtype), pairs(p.bias));
    read("key_mask", p.key_mask, {{tokens, 1}});
    read("modality", p.modality, {{tokens, 1}});
    read("image_id", p.image_id, {{tokens, 1}});
    p.gate.data = memory_.input("gate", p.gate.data, statistic_bytes_, rows(p.gate));

    const Axes out = outputs(p.out, p.value_dim);
    Axes group_out = rows(p.group_out);
    group_out.push_back({p.value_dim, 1});
    if (!backward) {
      p.out.data = memory_.result("out", p.out.data, element_size(p.dtype), out);
      write("lse", p.lse.data, rows(p.lse));
      write("lse_low", p.lse_low.data, rows(p.lse_low));
      write("group_out", p.group_out.data, group_out);
      return;
    }
    const auto kept = [](const void* data) { return const_cast<void*>(data); };
    p.out.data = kept(memory_.input("out", p.out.data, element_size(p.dtype), out));
    p.lse.data = kept(memory_.input("lse", p.lse.data, statistic_bytes_, rows(p.lse)));
    p.lse_low.data = kept(memory_.input("lse_low", p.lse_low.data, statistic_bytes_, rows(p.lse_low)));
    p.group_out.data = kept(memory_.input("group_out", p.group_out.data, statistic_bytes_, group_out));
    p.grad_out.data = memory_.input("grad_out", p.grad_out.data, element_size(p.dtype),
                                    outputs(p.grad_out, padded(p.dtype, p.value_dim)));
    p.grad_lse.data = memory_.input("grad_lse", p.grad_lse.data, statistic_bytes_, rows(p.grad_lse));
    gradient("grad_query", p.grad_query, p.q_heads, p.q_len, p.head_dim);
    gradient("grad_key", p.grad_key, p.kv_heads, p.k_len, p.head_dim);
    gradient("grad_value", p.grad_value, p.kv_heads, p.k_len, p.value_dim);
    p.grad_bias.data =
        memory_.result("grad_bias", p.grad_bias.data, statistic_bytes_, pairs(p.grad_bias), /*sum=*/true);
    write("grad_gate", p.grad_gate.data, rows(p.grad_gate));
  }

  Problem moved;

 private:
  std::int64_t batches() const { return moved.q_offsets ? 1 : moved.batch; }

  template <class Tensor>
  Axes pairs(const Tensor& t) const {
    return {{batches(), t.batch}, {moved.q_heads, t.head}, {moved.q_len, t.row}, {moved.k_len, t.feature}};
  }
  template <class Tensor>
  Axes outputs(const Tensor& t, std::int64_t dim) const {
    const bool apart = moved.is_mmca && moved.merge == Merge::none;
    return {{apart ? 2 : 1, t.group},
            {batches(), t.batch},
            {moved.q_heads, t.head},
            {moved.q_len, t.row},
            {dim, t.feature}};
  }
  template <class Statistic>
  Axes rows(const Statistic& s) const {
    return {{moved.groups(), s.group}, {batches(), s.batch}, {moved.q_heads, s.head}, {moved.q_len, s.row}};
  }

  void row(const char* name, Input& t, std::int64_t heads, std::int64_t length, std::int64_t dim) {
    t.data =
        memory_.input(name, t.data, element_size(moved.dtype),
                      {{batches(), t.batch}, {heads, t.head}, {length, t.row}, {padded(moved.dtype, dim), t.feature}});
  }
  void gradient(const char* name, Output& t, std::int64_t heads, std::int64_t length, std::int64_t dim) {
    t.data = memory_.result(name, t.data, element_size(moved.dtype),
                            {{batches(), t.batch}, {heads, t.head}, {length, t.row}, {dim, t.feature}});
  }
  template <class T>
  void read(const char* name, const T*& data, const Axes& axes) {
    data = static_cast<const T*>(memory_.input(name, data, sizeof(T), axes));
  }
  void write(const char* name, void*& data, const Axes& axes) {
    data = memory_.result(name, data, statistic_bytes_, axes);
  }

  DeviceMemory& memory_;
  std::int64_t statistic_bytes_;
};

// The same of linear attention.
class DeviceLinearProblem {
 public:
  DeviceLinearProblem(const LinearProblem& problem, Operation operation, DeviceMemory& memory)
      : moved(problem), memory_(memory) {
    LinearProblem& p = moved;
    row("query", p.query, p.q_heads, p.q_len, p.head_dim);
    row("key", p.key, p.kv_heads, p.k_len, p.head_dim);
    row("value", p.value, p.kv_heads, p.k_len, p.value_dim);
    read("q_offsets", p.q_offsets, p.batch + 1);
    read("k_offsets", p.k_offsets, p.batch + 1);
    read("key_mask", p.key_mask, batches() * p.k_len);
    read("S", p.state.sum, sums());
    read("z", p.state.normal, normals());
    if (operation == Operation::linear_forward) {
      result("out", p.out, p.q_heads, p.q_len, p.value_dim);
      write("final S", p.final_state.sum, sums());
      write("final z", p.final_state.normal, normals());
      return;
    }
    row("grad_out", p.grad_out, p.q_heads, p.q_len, p.value_dim);
    read("grad_S", p.grad_final_state.sum, sums());
    read("grad_z", p.grad_final_state.normal, normals());
    result("grad_query", p.grad_query, p.q_heads, p.q_len, p.head_dim);
    result("grad_key", p.grad_key, p.kv_heads, p.k_len, p.head_dim);
    result("grad_value", p.grad_value, p.kv_heads, p.k_len, p.value_dim);
    write("grad_state_S", p.grad_state.sum, sums());
    write("grad_state_z", p.grad_state.normal, normals());
    const RowStatistic<void*>& facts = p.row_facts;
    p.row_facts.data =
        memory_.result("row_facts", facts.data, p.dtype == DType::f64 ? 8 : 4,
                       {{2, facts.group}, {batches(), facts.batch}, {p.q_heads, facts.head}, {p.q_len, facts.row}});
  }

  LinearProblem moved;

 private:
  std::int64_t batches() const { return moved.q_offsets ? 1 : moved.batch; }
  std::int64_t normals() const { return moved.batch * moved.kv_heads * moved.head_dim; }
  std::int64_t sums() const { return normals() * moved.value_dim; }

  void row(const char* name, Input& t, std::int64_t heads, std::int64_t length, std::int64_t dim) {
    t.data =
        memory_.input(name, t.data, element_size(moved.dtype),
                      {{batches(), t.batch}, {heads, t.head}, {length, t.row}, {padded(moved.dtype, dim), t.feature}});
  }
  void result(const char* name, Output& t, std::int64_t heads, std::int64_t length, std::int64_t dim) {
    t.data = memory_.result(name, t.data, element_size(moved.dtype),
                            {{batches(), t.batch}, {heads, t.head}, {length, t.row}, {dim, t.feature}});
  }
  template <class T>
  void read(const char* name, const T*& data, std::int64_t count) {
    data = static_cast<const T*>(memory_.input(name, data, sizeof(T), {{count, 1}}));
  }
  void write(const char* name, double*& data, std::int64_t count) {
    data = static_cast<double*>(memory_.result(name, data, sizeof(double), {{count, 1}}));
  }

  DeviceMemory& memory_;
};

void run_on_emulated_device(Operation operation, const Problem& problem, c10::Device) {
  DeviceMemory memory;
  cuda::run(operation, DeviceProblem(problem, operation, memory).moved, memory, /*device=*/0, nullptr);
}
void run_linear_on_emulated_device(Operation operation, const LinearProblem& problem, c10::Device) {
  DeviceMemory memory;
  cuda::run(operation, DeviceLinearProblem(problem, operation, memory).moved, memory, /*device=*/0, nullptr);
}

const Backend emulated_backend{true, &cuda::needs_aligned_rows, &run_on_emulated_device,
                               &run_linear_on_emulated_device};

std::unique_ptr<torch::Library> registration;

struct Silence final : c10::WarningHandler {  // that an implementation is replaced is what is wanted
  void process(const c10::Warning&) override {}
};

}  // namespace

const Backend& backend_of(const char*, c10::Device) { return emulated_backend; }

}  // namespace mmca

// ---- for tests -------------------------------------------------------------------------------------------------

extern "C" {
#pragma GCC visibility push(default)

// From now on, or no longer, the operators' implementation for CPU tensors.
void emulated_device_enable(bool on) {
  using namespace mmca;
  registration.reset();
  if (!on) return;
  Silence silence;
  const c10::WarningUtils::WarningHandlerGuard guard(&silence);
  registration =
      std::make_unique<torch::Library>(torch::Library::IMPL, "mmca_ext", c10::DispatchKey::CPU, __FILE__, __LINE__);
  registration->impl("attention", &attention);
  registration->impl("attention_backward", &attention_backward);
  registration->impl("linear_attention", &linear_attention);
  registration->impl("linear_attention_backward", &linear_attention_backward);
}

// How often a kernel of the table has run; the kernels one after the other, null behind the last.
std::uint64_t emulated_device_launches(std::size_t index) {
  return mmca::cuda::launches(mmca::cuda::kernel_table()[index]);
}
const char* emulated_device_kernel(std::size_t index) {
  const auto& table = mmca::cuda::kernel_table();
  return index < table.size() ? table[index].name : nullptr;
}

#pragma GCC visibility pop
}
