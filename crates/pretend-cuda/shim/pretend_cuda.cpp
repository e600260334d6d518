// The pretended device itself, its own kernels, and its registration with libtorch.
#include "fallback.h"
#include "memory.h"
#include "pretend_cuda.h"

#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <dlfcn.h>
#include <unistd.h>

#include <cstdlib>

namespace {

using c10::Stream;

// ---- kernels of our own ---------------------------------------------------------------------

Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> kind, std::optional<at::Layout> layout,
    std::optional<Device>, std::optional<bool> pinned, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  TORCH_CHECK(layout.value_or(at::kStrided) == at::kStrided, "pretended CUDA: only dense tensors");
  return at::detail::empty_generic(
      C10_AS_INTARRAYREF_SLOW(size), &allocator(), DispatchKeySet(DispatchKey::CUDA),
      c10::dtype_or_default(kind), format);
}

Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> kind,
    std::optional<at::Layout>, std::optional<Device>, std::optional<bool> pinned) {
  TORCH_CHECK(!pinned.value_or(false), "Only dense CPU tensors can be pinned");
  return at::detail::empty_strided_generic(
      C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &allocator(),
      DispatchKeySet(DispatchKey::CUDA), c10::dtype_or_default(kind));
}

Tensor& copy_(Tensor& self, const Tensor& source, bool non_blocking) {
  ran("aten::copy_");
  bool to = on_device(self), from = on_device(source);
  if (to != from && self.numel() > 0) {
    count(non_blocking ? COPY_ASYNC : to ? TO_DEVICE : TO_HOST, "aten::copy_");
  }
  at::AutoDispatchBelowADInplaceOrView below;
  Loans loans;
  auto target = to_cpu(loans, self);
  target.copy_(to_cpu(loans, source));
  return self;
}

at::Scalar local_scalar_dense(const Tensor& self) {
  count(READ, "aten::_local_scalar_dense");
  Loans loans;
  return at::_local_scalar_dense(to_cpu(loans, self));
}

Tensor& set_storage(Tensor& self, Storage source, c10::SymInt offset, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  TORCH_CHECK(source.device().type() == CUDA, "Attempted to set the storage of a tensor on cuda:0 to a storage on cpu");
  auto* impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  if (stride.empty() && !sizes.empty()) {
    impl->set_storage_offset(offset.expect_int());
    impl->set_sizes_contiguous(sizes);
  } else {
    impl->set_sizes_and_strides(sizes, C10_AS_INTARRAYREF_SLOW(stride), offset.expect_int());
  }
  return self;
}

void record_stream(Tensor&, Stream) {}

// ---- the device itself ----------------------------------------------------------------------

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  Device exchangeDevice(Device device) const override {
    setDevice(device);
    return DEVICE;
  }
  Device getDevice() const override { return DEVICE; }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() <= 0, "CUDA error: invalid device ordinal");
  }
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream getDefaultStream(Device) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream getStreamFromGlobalPool(Device, bool) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream getNewStream(Device, int) const override { return Stream(Stream::DEFAULT, DEVICE); }
  Stream exchangeStream(Stream) const override { return Stream(Stream::DEFAULT, DEVICE); }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream&) const override { count(SYNCHRONIZE, "stream"); }
  void synchronizeEvent(void*) const override { count(SYNCHRONIZE, "event"); }
  void synchronizeDevice(c10::DeviceIndex) const override { count(SYNCHRONIZE, "device"); }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return device_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<DeviceGenerator>(at::detail::createCPUGenerator());
  }
  Device getDeviceFromPtr(void*) const override { return DEVICE; }
  bool isPinnedPtr(const void*) const override { return false; }
  bool hasCUDA() const override { return true; }
  bool hasCUDART() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return c10::GetCPUAllocator(); }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator(); }
  int getNumGPUs() const override { return 1; }
  std::string showConfig() const override { return "pretended CUDA"; }
  void deviceSynchronize(c10::DeviceIndex) const override { count(SYNCHRONIZE, "device"); }
};

int64_t choose_attention(
    const Tensor&, const Tensor&, const Tensor&, const std::optional<Tensor>&, double, bool, std::optional<double>, bool) {
  return 0; // written out in matrix products
}

// Whether the libtorch in use has a true CUDA half, which may have been loaded or may be later.
bool has_true_half() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&at::globalContext), &info)) return false;
  std::string library = info.dli_fname;
  return access((library.substr(0, library.rfind('/') + 1) + "libtorch_cuda.so").c_str(), F_OK) == 0;
}

bool install() {
  if (has_true_half() || c10::impl::device_guard_impl_registry[static_cast<size_t>(CUDA)].load() != nullptr) return false;
  at::CUDAHooksRegistry()->Register(
      "CUDAHooks", [](at::CUDAHooksArgs args) { return std::make_unique<Hooks>(args); });
  // Asked before the hooks were there, it would have answered for ever that there is no CUDA.
  if (!at::detail::getCUDAHooks().hasCUDA()) return false;
  c10::SetAllocator(CUDA, &allocator());
  static c10::impl::DeviceGuardImplRegistrar guard(CUDA, new Guard);
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&choose_attention);

  static torch::Library all(torch::Library::IMPL, "_", DispatchKey::CUDA, __FILE__, __LINE__);
  all.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
  static torch::Library aten(torch::Library::IMPL, "aten", DispatchKey::CUDA, __FILE__, __LINE__);
  aten.impl("empty.memory_format", TORCH_FN(empty));
  aten.impl("empty_strided", TORCH_FN(empty_strided));
  aten.impl("copy_", TORCH_FN(copy_));
  aten.impl("_local_scalar_dense", TORCH_FN(local_scalar_dense));
  aten.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage));
  aten.impl("record_stream", TORCH_FN(record_stream));
  return true;
}

// With PRETEND_CUDA=1 in the environment the device is there before main.
const bool at_start = std::getenv("PRETEND_CUDA") != nullptr && pretend_cuda_install();

} // namespace

extern "C" {
bool pretend_cuda_install() {
  static bool installed = install();
  return installed;
}
void pretend_cuda_on_event(void (*callback)(int32_t, const char*)) { on_event = callback; }
void pretend_cuda_on_operator(void (*callback)(const char*)) { on_operator = callback; }
void pretend_cuda_share_generator(bool share) { share_generator = share; }
}
