// A CUDA device guard and CUDA hooks that do nothing, for CPU builds of torch.
//
// With them, fake tensors on device cuda can be indexed and can go through autograd. Without them, torch raises
// "PyTorch is not linked with support for cuda devices". `fake_gpu.py` compiles and loads this file.

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/DeviceType.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstring>

namespace {

using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

constexpr auto kCuda = c10::DeviceType::CUDA;

Device only_device() { return Device(kCuda, 0); }
Stream only_stream() { return Stream(Stream::DEFAULT, only_device()); }

struct Guard : c10::impl::NoOpDeviceGuardImpl<kCuda> {
  Device exchangeDevice(Device) const override { return only_device(); }
  Device getDevice() const override { return only_device(); }
  Stream getStream(Device) const noexcept override { return only_stream(); }
  Stream getDefaultStream(Device) const override { return only_stream(); }
  Stream getNewStream(Device, int) const override { return only_stream(); }
  Stream exchangeStream(Stream) const noexcept override { return only_stream(); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const DeviceIndex) const override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const Stream&) const override {}
};

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void*) const override { return false; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};

}  // namespace

// Returns 1 if the guard and the hooks are installed, 0 if this torch has its own, 2 if torch does not accept them.
extern "C" int install() {
  auto& guard = c10::impl::device_guard_impl_registry[static_cast<size_t>(kCuda)];
  if (guard.load() != nullptr) return 0;
  guard.store(new Guard());
  // torch creates its hooks object at import. Replace its table of virtual functions by our object's table.
  static Hooks ours{at::CUDAHooksArgs{}};
  static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
  auto& theirs = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  std::memcpy(reinterpret_cast<void*>(&theirs), reinterpret_cast<void*>(&ours), sizeof(void*));
  return at::detail::getCUDAHooks().isBuilt() ? 1 : 2;
}
