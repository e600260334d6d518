// The part of libtorch's c10d that src/ffi.rs calls, with C linkage.
//
// Every function returns a status and never lets an exception out; c10d_message() has the reason of the
// last failure on the calling thread. A store and a group are handles that the caller frees once. Tensors
// are borrowed `at::Tensor*`, as tch holds them; a collective returns when it is complete, so nothing
// keeps a tensor beyond the call.
#define USE_C10D_GLOO
#include <torch/csrc/distributed/c10d/PrefixStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>
#include <torch/csrc/distributed/c10d/TCPStore.hpp>
#include <torch/csrc/distributed/c10d/exception.h>
#ifdef USE_C10D_NCCL
#include <torch/csrc/distributed/c10d/ProcessGroupNCCL.hpp>
#endif

#include <ATen/MemoryOverlap.h>

#include <chrono>
#include <cstdlib>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

namespace {

using c10d::Backend;
using c10d::Store;
using std::chrono::milliseconds;

enum Status : int { DONE = 0, FAILED = 1, TIMED_OUT = 2 };
enum Layout : int { CONTIGUOUS = 0, STRIDED = 1, OVERLAPPING = 2, NOT_STRIDED = 3 };

// Plain characters, so that keeping a message cannot throw.
thread_local char message[1024] = "";

void keep(const char* text) noexcept {
  std::snprintf(message, sizeof message, "%s", text);
}

// Gloo, the store and NCCL have one exception for every failure: only the words tell a time-out apart.
Status status_of(const char* text) noexcept {
  for (const char* words : {"imed out", "imeout"})
    if (std::strstr(text, words)) return TIMED_OUT;
  return FAILED;
}

template <class Action>
int guarded(Action&& action) noexcept {
  try {
    action();
    return DONE;
  } catch (const c10::Error& error) {
    keep(error.what_without_backtrace());
    return status_of(message);
  } catch (const std::exception& error) {
    keep(error.what());
    return status_of(message);
  } catch (...) {
    keep("an exception of unknown type");
    return FAILED;
  }
}

struct StoreHandle {
  c10::intrusive_ptr<Store> store;
};

struct GroupHandle {
  c10::intrusive_ptr<Backend> backend;
};

void finish(const c10::intrusive_ptr<c10d::Work>& work) {
  // Gloo's own time-out ends the work; giving up before it would leave a thread writing into the tensor.
  work->wait();
}

c10::intrusive_ptr<Backend> make_gloo(
    const c10::intrusive_ptr<Store>& store, int rank, int size, milliseconds timeout, bool loopback) {
  using c10d::ProcessGroupGloo;
  c10::intrusive_ptr<ProcessGroupGloo::Options> options;
  if (loopback) {
    // One machine: its name may resolve to an address that nobody answers at.
    options = ProcessGroupGloo::Options::create(timeout);
    options->devices.push_back(ProcessGroupGloo::createDeviceForHostname("127.0.0.1"));
  } else {
    options = ProcessGroupGloo::Options::create_default(timeout);
  }
  options->timeout = timeout;
  // Collectives run one after the other.
  options->threads = 1;
  return c10::make_intrusive<ProcessGroupGloo>(store, rank, size, options);
}

#ifdef USE_C10D_NCCL
c10::intrusive_ptr<Backend> make_nccl(
    const c10::intrusive_ptr<Store>& store, int rank, int size, milliseconds timeout) {
  // By default wait() returns before the work is done and a watchdog thread ends the process on a failure.
  // With these, wait() throws instead. A value that the user has set wins.
  setenv("TORCH_NCCL_BLOCKING_WAIT", "1", 0);
  setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0", 0);
  auto options = c10d::ProcessGroupNCCL::Options::create();
  options->timeout = timeout;
  return c10::make_intrusive<c10d::ProcessGroupNCCL>(store, rank, size, options);
}
#endif

} // namespace

extern "C" {

const char* c10d_message() {
  return message;
}

int c10d_store_open(
    const char* host, uint16_t port, bool server, int64_t timeout, const char* prefix, void** result) {
  return guarded([&] {
    c10d::TCPStoreOptions options;
    options.port = port;
    options.isServer = server;
    options.waitWorkers = false;
    options.timeout = milliseconds(timeout);
    // One process may have several groups at one address.
    options.multiTenant = true;
    auto store = c10::make_intrusive<c10d::TCPStore>(host, options);
    *result = new StoreHandle{c10::make_intrusive<c10d::PrefixStore>(prefix, std::move(store))};
  });
}

int c10d_store_set(void* store, const char* key, const char* value) {
  return guarded([&] { static_cast<StoreHandle*>(store)->store->set(key, std::string(value)); });
}

int c10d_store_add(void* store, const char* key, int64_t amount, int64_t* result) {
  return guarded([&] { *result = static_cast<StoreHandle*>(store)->store->add(key, amount); });
}

// Waits for a key and copies its value, cut to `capacity` bytes, the ending zero included.
int c10d_store_get(void* store, const char* key, int64_t timeout, char* value, size_t capacity) {
  return guarded([&] {
    auto& from = *static_cast<StoreHandle*>(store)->store;
    from.wait({key}, milliseconds(timeout));
    std::snprintf(value, capacity, "%s", from.get_to_str(key).c_str());
  });
}

void c10d_store_free(void* store) {
  guarded([&] { delete static_cast<StoreHandle*>(store); });
}

// `backend`: 0 for Gloo, 1 for NCCL. `connect` bounds the making of connections, `timeout` what follows.
int c10d_group_new(
    void* store, const char* prefix, int rank, int size, int backend, int64_t connect, int64_t timeout,
    bool loopback, void** result) {
  return guarded([&] {
    auto own = c10::make_intrusive<c10d::PrefixStore>(prefix, static_cast<StoreHandle*>(store)->store);
    c10::intrusive_ptr<Backend> made;
    if (backend == 0) {
      made = make_gloo(own, rank, size, milliseconds(connect), loopback);
      made->setTimeout(milliseconds(timeout));
    } else {
#ifdef USE_C10D_NCCL
      made = make_nccl(own, rank, size, milliseconds(timeout));
#else
      TORCH_CHECK(false, "built without the feature nccl");
#endif
    }
    *result = new GroupHandle{std::move(made)};
  });
}

int c10d_all_reduce_sum(void* group, at::Tensor* tensor) {
  return guarded([&] {
    std::vector<at::Tensor> tensors{*tensor};
    finish(static_cast<GroupHandle*>(group)->backend->allreduce(tensors));
  });
}

int c10d_broadcast(void* group, at::Tensor* tensor, int64_t root) {
  return guarded([&] {
    std::vector<at::Tensor> tensors{*tensor};
    c10d::BroadcastOptions options;
    options.rootRank = root;
    finish(static_cast<GroupHandle*>(group)->backend->broadcast(tensors, options));
  });
}

// `output` has one row of the shape of `input` for each rank.
int c10d_all_gather(void* group, at::Tensor* output, at::Tensor* input) {
  return guarded([&] {
    std::vector<std::vector<at::Tensor>> outputs{output->unbind(0)};
    std::vector<at::Tensor> inputs{*input};
    finish(static_cast<GroupHandle*>(group)->backend->allgather(outputs, inputs));
  });
}

// As c10d_all_gather, on rank 0 alone; the other ranks pass a null pointer as output.
int c10d_gather(void* group, at::Tensor* output, at::Tensor* input) {
  return guarded([&] {
    std::vector<std::vector<at::Tensor>> outputs;
    if (output) outputs.push_back(output->unbind(0));
    std::vector<at::Tensor> inputs{*input};
    finish(static_cast<GroupHandle*>(group)->backend->gather(outputs, inputs));
  });
}

void c10d_group_free(void* group) {
  guarded([&] { delete static_cast<GroupHandle*>(group); });
}

int c10d_layout(at::Tensor* tensor, int* result) {
  return guarded([&] {
    if (tensor->layout() != at::kStrided || tensor->is_quantized())
      *result = NOT_STRIDED;
    else if (tensor->is_contiguous())
      *result = CONTIGUOUS;
    else
      *result = at::has_internal_overlap(*tensor) == at::MemOverlap::Yes ? OVERLAPPING : STRIDED;
  });
}

} // extern "C"
