// A pretended CUDA device for tests; README.md says what it is and how it works.
#pragma once
#include <cstdint>

// What crosses between host and device. All but COPY_ASYNC make the host wait.
enum PretendEvent : int32_t {
  READ = 0,         // a scalar is read: item(), is_nonzero(), equal()
  SIZE = 1,         // the size of a result is awaited: nonzero(), masked_select()
  TO_HOST = 2,      // a blocking copy from the device
  TO_DEVICE = 3,    // a blocking copy to the device
  COPY_ASYNC = 4,   // a copy with non_blocking; from pageable memory it is staged before the call returns
  SYNCHRONIZE = 5,  // an explicit wait
};

extern "C" {
// Registers the device `cuda:0` with libtorch, once. False where libtorch has a CUDA half of its own, and where
// it has answered already that there is no CUDA.
bool pretend_cuda_install();
// Called at each event with the name of the operator; null for none.
void pretend_cuda_on_event(void (*callback)(int32_t event, const char* op));
// Called at each operator that computes on the device, views left out; null for none.
void pretend_cuda_on_operator(void (*callback)(const char* op));
// Draws from the generator of the CPU (true) or from the device's own (false, as CUDA does).
void pretend_cuda_share_generator(bool share);
}
