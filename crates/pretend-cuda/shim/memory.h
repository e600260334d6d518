// The memory of the device: the host's, under pointers that the host cannot follow, and lent to tensors of the CPU
// for one call. Included once, by pretend_cuda.cpp.
#pragma once
#include <ATen/ATen.h>
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using c10::Device;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::Storage;
using c10::StorageImpl;

constexpr auto CPU = c10::DeviceType::CPU;
constexpr auto CUDA = c10::DeviceType::CUDA;
const Device DEVICE(CUDA, 0);

// A device pointer is the host's with this bit, so that following it on the host is a fault.
constexpr uintptr_t TAG = uintptr_t(1) << 54;

void* to_device_pointer(const void* host) {
  return host ? reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(host) | TAG) : nullptr;
}

void* to_host_pointer(const void* pointer) {
  if (!pointer) return nullptr;
  auto bits = reinterpret_cast<uintptr_t>(pointer);
  TORCH_CHECK(bits & TAG, "pretended CUDA: host memory under the name of device memory");
  return reinterpret_cast<void*>(bits & ~TAG);
}

// Keeps memory or a storage of the host alive under the name of the device.
struct Held {
  c10::DataPtr data;
  Storage storage;
};

void drop_held(void* held) { delete static_cast<Held*>(held); }

c10::DataPtr held(Held* held, const void* host) { return {to_device_pointer(host), held, &drop_held, DEVICE}; }

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    auto data = c10::GetCPUAllocator()->allocate(bytes);
    const void* host = data.get();
    return held(new Held{std::move(data), Storage()}, host);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    std::memcpy(to_host_pointer(to), to_host_pointer(from), bytes);
  }
};

DeviceAllocator& allocator() {
  static auto* one = new DeviceAllocator;
  return *one;
}

void drop_storage(void* storage) { delete static_cast<Storage*>(storage); }

// The storages lent to the CPU for one call.
struct Loans {
  std::vector<std::pair<Storage, Storage>> pairs; // of the device, of the CPU

  Storage lend(const Storage& device) {
    for (auto& [ours, theirs] : pairs)
      if (ours.unsafeGetStorageImpl() == device.unsafeGetStorageImpl()) return theirs;
    c10::DataPtr data(to_host_pointer(device.unsafeGetStorageImpl()->data()), new Storage(device), &drop_storage, CPU);
    Storage theirs(c10::make_intrusive<StorageImpl>(
        StorageImpl::use_byte_size_t(), device.nbytes(), std::move(data), c10::GetCPUAllocator(), true));
    pairs.emplace_back(device, theirs);
    return theirs;
  }

  Storage take(const Storage& cpu) {
    for (auto& [ours, theirs] : pairs)
      if (theirs.unsafeGetStorageImpl() == cpu.unsafeGetStorageImpl()) return ours;
    auto bytes = cpu.nbytes();
    auto data = held(new Held{c10::DataPtr(), cpu}, cpu.unsafeGetStorageImpl()->data());
    Storage ours(c10::make_intrusive<StorageImpl>(
        StorageImpl::use_byte_size_t(), bytes, std::move(data), &allocator(), true));
    pairs.emplace_back(ours, cpu);
    return ours;
  }
};

Tensor relabelled(const Tensor& from, Storage storage, DispatchKey key) {
  auto to = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), DispatchKeySet(key), from.dtype());
  auto* impl = to.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(from.sizes(), from.strides(), from.storage_offset());
  if (from.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
  to._set_conj(from.is_conj());
  to._set_neg(from.is_neg());
  return to;
}

bool on_device(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == CUDA; }

Tensor to_cpu(Loans& loans, const Tensor& tensor) {
  if (!on_device(tensor)) return tensor;
  TORCH_CHECK(tensor.layout() == c10::kStrided, "pretended CUDA: only dense tensors");
  return relabelled(tensor, loans.lend(tensor.storage()), DispatchKey::CPU);
}

Tensor to_device(Loans& loans, const Tensor& tensor) {
  if (!tensor.defined() || tensor.device().type() != CPU) return tensor;
  return relabelled(tensor, loans.take(tensor.storage()), DispatchKey::CUDA);
}

// What the kernel did to the shape or the storage of an argument that it wrote to.
void take_over_shape(Loans& loans, const Tensor& ours, const Tensor& theirs) {
  auto mine = ours.storage();
  auto lent = loans.lend(mine);
  if (theirs.storage().unsafeGetStorageImpl() == lent.unsafeGetStorageImpl()) {
    if (lent.unsafeGetStorageImpl()->data() != to_host_pointer(mine.unsafeGetStorageImpl()->data()) ||
        lent.nbytes() != mine.nbytes()) {
      // Resized: the memory is now that of the CPU's storage, which moves out of reach.
      auto bytes = lent.nbytes();
      Storage moved(c10::make_intrusive<StorageImpl>(
          StorageImpl::use_byte_size_t(), bytes, lent.unsafeGetStorageImpl()->set_data_ptr(c10::DataPtr(nullptr, CPU)),
          c10::GetCPUAllocator(), true));
      const void* host = moved.unsafeGetStorageImpl()->data();
      mine.unsafeGetStorageImpl()->set_data_ptr_noswap(held(new Held{c10::DataPtr(), moved}, host));
      mine.unsafeGetStorageImpl()->set_nbytes(bytes);
    }
  } else {
    ours.unsafeGetTensorImpl()->set_storage_keep_dtype(loans.take(theirs.storage()));
  }
  if (ours.sizes() != theirs.sizes() || ours.strides() != theirs.strides() ||
      ours.storage_offset() != theirs.storage_offset())
    ours.unsafeGetTensorImpl()->set_sizes_and_strides(theirs.sizes(), theirs.strides(), theirs.storage_offset());
}

} // namespace
