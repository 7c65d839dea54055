// mmca_ext._C: importing it registers the operators; it offers the kernels' direct entry points (no dispatcher, no
// autograd) and what there is to know about this build and this processor.
#include <torch/csrc/utils/pybind.h>

#include <c10/core/impl/VirtualGuardImpl.h>

#include <map>

#include "core/kernel_table.h"
#ifdef MMCA_EXT_WITH_CUDA
#include "cuda/run.h"
#endif
#include "torch/build_info.h"
#include "torch/linear_ops.h"
#include "torch/ops.h"

namespace py = pybind11;
using namespace py::literals;

namespace mmca {
namespace {

py::dict build_info() { return py::module_::import("json").attr("loads")(build_info_json()); }

py::dict cpu_feature_dict() {
  py::dict features;
  for (const CpuFeature& feature : cpu_features()) features[feature.name] = feature.present;
  return features;
}

// Why a kernel is, or is not, the one that serves its case on this processor.
std::string reason(const Kernel& kernel, const Kernel& chosen, const Kernel& chosen_for_few_keys) {
  const std::string refused = refusal(kernel, cpu_features(), forced_isa());
  if (!refused.empty()) return refused;
  const std::string limit = std::to_string(chosen.fewest_keys) + " keys";
  const bool split = &chosen != &chosen_for_few_keys;
  if (&kernel == &chosen) return "the best this processor runs" + (split ? ", from " + limit : "");
  if (split && &kernel == &chosen_for_few_keys) return "serves fewer than " + limit;
  return std::string(chosen.name) + " is preferred";
}

#ifdef MMCA_EXT_WITH_CUDA
// Of each case the first kernel that the current GPU takes serves it.
void append_cuda_kernels(py::list& list) {
  const bool supported = c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA);
  const auto guards = [] { return c10::impl::VirtualGuardImpl(c10::DeviceType::CUDA); };
  const bool present = supported && guards().deviceCount() > 0;
  const cuda::Device device = present ? cuda::device_at(guards().getDevice().index()) : cuda::Device{};
  std::map<std::pair<Operation, DType>, const char*> serving;
  for (const cuda::Kernel& kernel : cuda::kernel_table()) {
    const std::string refused = !supported ? "this torch is built without CUDA"
                                : !present ? "there is no GPU here"
                                           : cuda::refusal(kernel, device);
    const auto best =
        refused.empty() ? serving.try_emplace({kernel.operation, kernel.dtype}, kernel.name).first : serving.end();
    const bool selected = refused.empty() && best->second == kernel.name;
    const std::string family = std::string(kernel.name).substr(5);  // behind "cuda."
    list.append(py::dict("name"_a = kernel.name, "op"_a = to_string(kernel.operation),
                         "dtype"_a = to_string(kernel.dtype), "device"_a = "cuda",
                         "isa"_a = family.substr(0, family.find('.')), "available"_a = refused.empty(),
                         "selected"_a = selected, "launches"_a = cuda::launches(kernel),
                         "reason"_a = !refused.empty() ? refused
                                      : selected       ? "the best this GPU runs"
                                                       : std::string(best->second) + " is preferred"));
  }
}
#else
void append_cuda_kernels(py::list&) {}
#endif

py::list kernels() {
  py::list list;
  for (const Kernel& kernel : kernel_table()) {
    const Kernel& chosen = select_kernel(kernel.operation, kernel.dtype, cpu_features(), forced_isa());
    const Kernel& few = select_kernel(kernel.operation, kernel.dtype, cpu_features(), forced_isa(), /*k_len=*/0);
    list.append(py::dict("name"_a = kernel.name, "op"_a = to_string(kernel.operation),
                         "dtype"_a = to_string(kernel.dtype), "device"_a = "cpu", "isa"_a = to_string(kernel.isa),
                         "available"_a = refusal(kernel, cpu_features(), forced_isa()).empty(),
                         "selected"_a = &kernel == &chosen, "launches"_a = launches(kernel),
                         "reason"_a = reason(kernel, chosen, few)));
  }
  append_cuda_kernels(list);
  return list;
}

py::object forced() {
  const auto isa = forced_isa();
  return isa ? py::object(py::str(to_string(*isa))) : py::object(py::none());
}

void force(const std::optional<std::string>& isa) { isa ? force_isa(*isa) : unforce_isa(); }

}  // namespace
}  // namespace mmca

PYBIND11_MODULE(_C, m) {
  using namespace mmca;
  m.doc() = "Compiled kernels of mmca_ext. Importing this module registers torch.ops.mmca_ext.";
  m.def("build_info", &build_info, "What this binary was built from and against.");
  m.def("cpu_features", &cpu_feature_dict, "The processor's features the kernels ask for: name -> present.");
  m.def("kernels", &kernels, "The kernel table: one dict per kernel, and why it is or is not the one that runs.");
  m.def("forced_isa", &forced, "The instruction set selection is restricted to, or None.");
  m.def("force_isa", &force, "isa"_a,
        "Restricts kernel selection to one instruction set (None: the best); for tests and measurements.");

  // The kernels themselves: no dispatcher, no autograd; arguments as in the operators' schemas.
  const auto no_gil = py::call_guard<py::gil_scoped_release>();
  m.def("attention_forward", &attention, "query"_a, "key"_a, "value"_a, "attn_mask"_a = py::none(),
        "gate"_a = py::none(), "key_mask"_a = py::none(), "modality"_a = py::none(), "image_id"_a = py::none(),
        "cu_seqlens_q"_a = py::none(), "cu_seqlens_k"_a = py::none(), "rng_state"_a = py::none(),
        "save_for_backward"_a = false, "image_rows"_a = "self", "merge"_a = "sum", "scale"_a = py::none(),
        "softcap"_a = 0.0, "is_causal"_a = false, "window_left"_a = -1, "window_right"_a = -1,
        "max_seqlen_q"_a = py::none(), "max_seqlen_k"_a = py::none(), "dropout_p"_a = 0.0, "deterministic"_a = false,
        no_gil, "The forward kernel itself -> (out, lse, lse_low, group_out).");
  m.def("attention_backward", &attention_backward, "grad_out"_a, "grad_lse"_a, "query"_a, "key"_a, "value"_a, "out"_a,
        "lse"_a, "lse_low"_a, "group_out"_a, "attn_mask"_a = py::none(), "gate"_a = py::none(),
        "key_mask"_a = py::none(), "modality"_a = py::none(), "image_id"_a = py::none(), "cu_seqlens_q"_a = py::none(),
        "cu_seqlens_k"_a = py::none(), "rng_state"_a = py::none(), "attn_mask_gradient"_a = false,
        "image_rows"_a = "self", "merge"_a = "sum", "scale"_a = py::none(), "softcap"_a = 0.0, "is_causal"_a = false,
        "window_left"_a = -1, "window_right"_a = -1, "max_seqlen_q"_a = py::none(), "max_seqlen_k"_a = py::none(),
        "dropout_p"_a = 0.0, "deterministic"_a = false, no_gil,
        "The backward kernel itself -> (grad_query, grad_key, grad_value, grad_attn_mask, grad_gate).");
  m.def("linear_forward", &linear_attention, "query"_a, "key"_a, "value"_a, "state_S"_a = py::none(),
        "state_z"_a = py::none(), "key_mask"_a = py::none(), "cu_seqlens_q"_a = py::none(),
        "cu_seqlens_k"_a = py::none(), "return_state"_a = false, "is_causal"_a = false, no_gil,
        "The forward kernel of linear attention itself -> (out, S, z).");
  m.def("linear_backward", &linear_attention_backward, "grad_out"_a, "grad_S"_a, "grad_z"_a, "query"_a, "key"_a,
        "value"_a, "state_S"_a = py::none(), "state_z"_a = py::none(), "key_mask"_a = py::none(),
        "cu_seqlens_q"_a = py::none(), "cu_seqlens_k"_a = py::none(), "is_causal"_a = false, no_gil,
        "The backward kernel of linear attention itself -> (grad_query, grad_key, grad_value, grad_state_S, "
        "grad_state_z).");
}
