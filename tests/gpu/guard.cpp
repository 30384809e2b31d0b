// Device guards for GPUs that do not exist: a PyTorch without CUDA and Metal refuses to index a tensor on such a device if nothing
// keeps track of the current device. This library registers guards that do so for two CUDA cards and one MPS device. Nothing is
// run on a device: pretend.py computes every operator on the CPU.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

template <c10::DeviceType TYPE, int COUNT>
struct PretendedGuard : c10::impl::NoOpDeviceGuardImpl<TYPE> {
  static thread_local c10::DeviceIndex current;

  c10::DeviceIndex deviceCount() const noexcept override { return COUNT; }
  c10::Device getDevice() const override { return c10::Device(TYPE, current); }
  void setDevice(c10::Device device) const override { uncheckedSetDevice(device); }
  void uncheckedSetDevice(c10::Device device) const noexcept override {
    if (device.has_index()) current = device.index();
  }
  c10::Device exchangeDevice(c10::Device device) const override {
    c10::Device before = getDevice();
    uncheckedSetDevice(device);
    return before;
  }
};

template <c10::DeviceType TYPE, int COUNT>
thread_local c10::DeviceIndex PretendedGuard<TYPE, COUNT>::current = 0;

using CudaGuard = PretendedGuard<c10::DeviceType::CUDA, 2>;
using MpsGuard = PretendedGuard<c10::DeviceType::MPS, 1>;

}  // namespace

namespace c10::impl {
C10_REGISTER_GUARD_IMPL(CUDA, CudaGuard)
C10_REGISTER_GUARD_IMPL(MPS, MpsGuard)
}  // namespace c10::impl

extern "C" int pretended_device(int index) {  // the current CUDA card; it is changed first if the index is not negative
  if (index >= 0) CudaGuard::current = static_cast<c10::DeviceIndex>(index);
  return CudaGuard::current;
}
