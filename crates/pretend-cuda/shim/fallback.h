// Every operator without a kernel of its own comes to `fallback`, which looks at the arguments, lends the memory of the
// device to tensors of the CPU, runs the kernel of the CPU on them, and takes the results back. Nothing is copied.
// Included once, by pretend_cuda.cpp.
#pragma once
#include "memory.h"
#include "pretend_cuda.h"

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/op_registration/adaption.h>

#include <atomic>
#include <string>
#include <unordered_map>

namespace {

using c10::IValue;
using Stack = torch::jit::Stack;

std::atomic<void (*)(int32_t, const char*)> on_event{nullptr};
std::atomic<void (*)(const char*)> on_operator{nullptr};

void count(PretendEvent event, const char* op) {
  if (auto callback = on_event.load()) callback(event, op);
}

void ran(const char* op) {
  if (auto callback = on_operator.load()) callback(op);
}

// ---- random numbers -------------------------------------------------------------------------

std::atomic<bool> share_generator{false};

// The device's generator: one of the CPU's kind under the name of the device.
struct DeviceGenerator final : c10::GeneratorImpl {
  at::Generator inner;
  explicit DeviceGenerator(at::Generator of)
      : GeneratorImpl(DEVICE, DispatchKeySet(DispatchKey::CUDA)), inner(std::move(of)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { inner.set_offset(offset); }
  uint64_t get_offset() const override { return inner.get_offset(); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  DeviceGenerator* clone_impl() const override { return new DeviceGenerator(inner.clone()); }
};

const at::Generator& device_generator() {
  static auto* one = new at::Generator(at::make_generator<DeviceGenerator>(at::detail::createCPUGenerator()));
  return *one;
}

IValue generator_for(const IValue& given, const char* op) {
  if (!given.isNone()) {
    auto generator = given.toGenerator();
    TORCH_CHECK(
        generator.device().type() == CUDA, "Expected a 'cuda' device type for generator but found 'cpu' (", op, ")");
    return static_cast<DeviceGenerator*>(generator.unsafeGetGeneratorImpl())->inner;
  }
  if (share_generator) return at::detail::getDefaultCPUGenerator();
  return static_cast<DeviceGenerator*>(device_generator().unsafeGetGeneratorImpl())->inner;
}

// ---- what CUDA does with an operator --------------------------------------------------------

struct Rule {
  bool several_devices; // no check that all tensors are on one device
  bool has_kernel;
};

const Rule* rule_of(const std::string& op) {
  static const std::unordered_map<std::string, Rule> rules = [] {
    struct { const char* op; int several_devices, has_kernel; } all[] = {
#include "cuda_operators.inc"
    };
    std::unordered_map<std::string, Rule> rules;
    for (auto& one : all) rules[std::string("aten::") + one.op] = Rule{one.several_devices != 0, one.has_kernel != 0};
    return rules;
  }();
  auto found = rules.find(op);
  return found == rules.end() ? nullptr : &found->second;
}

bool starts_with(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }

// The operators whose CUDA kernels wait for the device.
void count_wait(const std::string& op, const Stack& stack, size_t first) {
  auto tensor = [&](size_t at) {
    const auto& value = stack[first + at];
    return value.isTensor() ? value.toTensor() : Tensor();
  };
  auto name = op.c_str();
  for (auto waits : {"aten::nonzero", "aten::masked_select", "aten::_unique", "aten::unique_", "aten::bincount",
                     "aten::repeat_interleave.Tensor"})
    if (starts_with(op, waits) && !starts_with(op, "aten::nonzero_static")) return count(SIZE, name);
  for (auto waits : {"aten::equal", "aten::multinomial", "aten::_linalg_eigh", "aten::_linalg_svd",
                     "aten::linalg_eig", "aten::linalg_lstsq", "aten::_linalg_eigvals"})
    if (starts_with(op, waits)) return count(READ, name);
  // The value is read when it is a tensor of the device.
  if (op == "aten::masked_fill_.Tensor" && on_device(tensor(2))) return count(READ, name);
  if (op == "aten::index_fill_.int_Tensor" && on_device(tensor(3))) return count(READ, name);
  // Scalars of the CPU are copied to the device, and waited for.
  if (starts_with(op, "aten::where.self"))
    for (size_t at = 0; at < 3; at++)
      if (tensor(at).defined() && !on_device(tensor(at))) count(TO_DEVICE, name);
  if (op == "aten::_index_put_impl_")
    for (const auto& index : stack[first + 1].toListRef()) {
      if (!index.isTensor() || !index.toTensor().defined()) continue;
      auto kind = index.toTensor().scalar_type();
      if (!on_device(index.toTensor()))
        count(TO_DEVICE, name);
      else if (kind == at::kBool || kind == at::kByte)
        count(SIZE, name);
    }
}

// Arguments that CUDA takes from the CPU whatever their shape.
bool may_be_on_cpu(const std::string& op, const std::string& argument) {
  if (argument == "indices") return starts_with(op, "aten::index.") || op == "aten::_index_put_impl_";
  return false;
}

void check_devices(const std::string& op, const c10::FunctionSchema& schema, const Stack& stack, size_t first) {
  auto rule = rule_of(op);
  if (!rule) return; // not of aten: nothing is known
  if (!rule->has_kernel)
    TORCH_CHECK_NOT_IMPLEMENTED(
        false, "Could not run '", op, "' with arguments from the 'CUDA' backend: it has no CUDA kernel");
  auto refuse = [&](const Tensor& tensor, const std::string& argument) {
    auto method = "wrapper_CUDA_" + op.substr(6);
    c10::impl::common_device_check_failure(DEVICE, tensor, method.c_str(), argument.c_str());
  };
  auto check = [&](const Tensor& tensor, const std::string& argument) {
    if (!tensor.defined() || on_device(tensor)) return;
    bool is_scalar = tensor.dim() == 0 && rule->several_devices;
    if (!is_scalar && !may_be_on_cpu(op, argument)) refuse(tensor, argument);
  };
  const auto& arguments = schema.arguments();
  for (size_t i = 0; i < arguments.size(); i++) {
    const auto& value = stack[first + i];
    if (value.isTensor()) {
      check(value.toTensor(), arguments[i].name());
    } else if (value.isTensorList() || value.isList()) {
      for (const auto& one : value.toListRef())
        if (one.isTensor()) check(one.toTensor(), arguments[i].name());
    }
  }
}

// ---- every operator -------------------------------------------------------------------------

// A result that shares its memory with an argument and is not written to: nothing is computed.
bool is_view(const c10::FunctionSchema& schema) {
  for (const auto& result : schema.returns())
    if (auto* alias = result.alias_info()) return !alias->isWrite();
  return false;
}

bool is_generator(const c10::Argument& argument) { return argument.name() == "generator"; }

void fallback(const c10::OperatorHandle& op, Stack* stack) {
  const auto& schema = op.schema();
  const auto& arguments = schema.arguments();
  const auto name = c10::toString(schema.operator_name());
  const auto first = stack->size() - arguments.size();
  if (!is_view(schema)) ran(name.c_str());
  check_devices(name, schema, *stack, first);
  count_wait(name, *stack, first);
  if (!op.hasComputedKernelForDispatchKey(DispatchKey::CPU))
    TORCH_CHECK_NOT_IMPLEMENTED(false, "pretended CUDA: ", name, " has no kernel for the CPU to stand in");

  at::AutoDispatchBelowADInplaceOrView below;
  Loans loans;
  std::vector<std::pair<IValue, IValue>> lent; // arguments before and after, where tensors
  std::vector<IValue> before(stack->begin() + first, stack->end());
  for (size_t i = 0; i < arguments.size(); i++) {
    auto& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = to_cpu(loans, value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& one : value.toTensorVector()) list.push_back(to_cpu(loans, one));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& one : value.toOptionalTensorVector())
        list.push_back(one ? std::optional<Tensor>(to_cpu(loans, *one)) : std::nullopt);
      value = list;
    } else if (value.isDevice()) {
      if (value.toDevice().type() == CUDA) value = Device(CPU);
    } else if (is_generator(arguments[i])) {
      value = generator_for(value, name.c_str());
    }
  }
  std::vector<IValue> after(stack->begin() + first, stack->end());

  op.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);

  for (size_t i = 0; i < arguments.size(); i++) {
    auto* alias = arguments[i].alias_info();
    if (!alias || !alias->isWrite()) continue;
    if (before[i].isTensor()) {
      if (on_device(before[i].toTensor())) take_over_shape(loans, before[i].toTensor(), after[i].toTensor());
    } else if (before[i].isTensorList()) {
      auto ours = before[i].toTensorVector(), theirs = after[i].toTensorVector();
      for (size_t k = 0; k < ours.size(); k++)
        if (on_device(ours[k])) take_over_shape(loans, ours[k], theirs[k]);
    }
  }
  const auto& returns = schema.returns();
  const auto first_return = stack->size() - returns.size();
  for (size_t r = 0; r < returns.size(); r++) {
    auto& value = (*stack)[first_return + r];
    if (value.isTensor()) {
      // An argument that was written to is returned as itself.
      bool is_argument = false;
      if (auto* alias = returns[r].alias_info(); alias && alias->isWrite())
        for (size_t i = 0; i < arguments.size() && !is_argument; i++)
          if (after[i].isTensor() && after[i].toTensor().is_same(value.toTensor())) {
            value = before[i];
            is_argument = true;
          }
      if (!is_argument) value = to_device(loans, value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& one : value.toTensorVector()) list.push_back(to_device(loans, one));
      value = list;
    }
  }
}

} // namespace
