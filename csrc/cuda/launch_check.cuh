// Every kernel launch is followed by USERIP_LAUNCH_CHECK("name of the launch"); every runtime call
// that can fail is wrapped in USERIP_CUDA_CHECK. Both throw std::runtime_error with CUDA's own
// words.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace userip_fast {

inline void cuda_check(cudaError_t status, const char* what) {
    if (status != cudaSuccess) {
        throw std::runtime_error(std::string(what) + ": " + cudaGetErrorName(status) + " (" +
                                 cudaGetErrorString(status) + ")");
    }
}

// Makes `device` current for a scope, as the caller's stream demands, and puts the old one back.
class DeviceGuard {
  public:
    explicit DeviceGuard(int device) {
        cuda_check(cudaGetDevice(&previous_), "cudaGetDevice");
        if (device != previous_) {
            cuda_check(cudaSetDevice(device), "cudaSetDevice");
        }
    }
    ~DeviceGuard() { cudaSetDevice(previous_); }
    DeviceGuard(const DeviceGuard&) = delete;
    DeviceGuard& operator=(const DeviceGuard&) = delete;

  private:
    int previous_ = 0;
};

}  // namespace userip_fast

#define USERIP_CUDA_CHECK(call) ::userip_fast::cuda_check((call), #call)
#define USERIP_LAUNCH_CHECK(name) ::userip_fast::cuda_check(cudaGetLastError(), name)
