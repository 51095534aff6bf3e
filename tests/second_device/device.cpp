// A second device for a torch without CUDA: tensors are on "cuda:N", their numbers are in the
// host's memory, and every operator is torch's CPU kernel on that memory. README.md tells what this
// proves and what it cannot.
//
//     tensor on cuda:0 --(fallback)--> the same memory as a CPU tensor --> CPU kernel
//         --> the result as cuda:0
//
// It refuses what a GPU refuses: operands on two devices, a generator of the other device, tensors
// of another process's GPU. Python is told of everything that makes the host wait for a GPU
// (`watch`), and live bytes are counted.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>

#include <cstdlib>
#include <map>
#include <mutex>
#include <set>

namespace {

using c10::IValue;
constexpr auto kType = c10::DeviceType::CUDA;
constexpr auto kKey = c10::DispatchKey::CUDA;

c10::DeviceIndex own_index() {
  static const char* rank = std::getenv("LOCAL_RANK");
  return static_cast<c10::DeviceIndex>(rank ? std::atoi(rank) : 0);
}
c10::Device own_device() { return {kType, own_index()}; }
const c10::Device kHost(c10::kCPU);

// Each rank has one GPU; real hardware would not notice the use of another one.
void check_own(c10::Device device) {
  TORCH_CHECK(!device.has_index() || device.index() == own_index(),
              "this rank's device is ", own_device(), ", but the call needs ", device);
}

// ---- waits of the host
py::object* watcher = nullptr;

void host_waits(const std::string& what) {
  if (!watcher) return;
  py::gil_scoped_acquire gil;
  (*watcher)(what);
}

// ---- memory
std::mutex ledger;
int64_t live_bytes = 0, peak_bytes = 0;

void count(int64_t bytes) {
  std::lock_guard<std::mutex> lock(ledger);
  live_bytes += bytes;
  peak_bytes = std::max(peak_bytes, live_bytes);
}
// The blocks of torch's CUDA allocator.
int64_t in_blocks(size_t bytes) { return (bytes + 511) / 512 * 512; }

struct Block { void* memory; size_t bytes; };

struct DeviceAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &c10::detail::deleteNothing, own_device()};
    auto* block = new Block{c10::alloc_cpu(bytes), bytes};
    count(in_blocks(bytes));
    return {block->memory, block, &release, own_device()};
  }
  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    count(-in_blocks(block->bytes));
    c10::free_cpu(block->memory);
    delete block;
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
} allocator;

std::map<const char*, size_t> pinned_blocks;

bool is_pinned_memory(const void* memory) {
  std::lock_guard<std::mutex> lock(ledger);
  auto after = pinned_blocks.upper_bound(static_cast<const char*>(memory));
  if (after == pinned_blocks.begin()) return false;
  auto [start, bytes] = *std::prev(after);
  return static_cast<const char*>(memory) < start + bytes;
}

struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    bytes = std::max<size_t>(bytes, 1);
    void* memory = c10::alloc_cpu(bytes);
    std::lock_guard<std::mutex> lock(ledger);
    pinned_blocks[static_cast<const char*>(memory)] = bytes;
    return {memory, memory, &release, kHost};
  }
  static void release(void* memory) {
    {
      std::lock_guard<std::mutex> lock(ledger);
      pinned_blocks.erase(static_cast<const char*>(memory));
    }
    c10::free_cpu(memory);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
  bool record_event(void*, void*, c10::Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
} pinned_allocator;

// ---- one device, one stream, one generator
struct Guard final : c10::impl::DeviceGuardImplInterface {
  static c10::Stream stream() { return c10::Stream(c10::Stream::DEFAULT, own_device()); }
  c10::DeviceType type() const override { return kType; }
  c10::DeviceIndex deviceCount() const noexcept override { return own_index() + 1; }
  c10::Device getDevice() const override { return own_device(); }
  c10::Device exchangeDevice(c10::Device device) const override {
    setDevice(device);
    return own_device();
  }
  void setDevice(c10::Device device) const override { check_own(device); }
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device) const override { return stream(); }
  c10::Stream getDefaultStream(c10::Device) const override { return stream(); }
  c10::Stream getStreamFromGlobalPool(c10::Device, bool) const override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const override { return stream(); }
  void record(void** event, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    *event = const_cast<Guard*>(this);
  }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { host_waits("synchronize stream"); }
  void synchronizeEvent(void*) const override { host_waits("synchronize event"); }
  void synchronizeDevice(c10::DeviceIndex) const override { host_waits("synchronize device"); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

struct Generator final : c10::GeneratorImpl {  // a CPU generator under the device's name
  at::Generator inner;
  explicit Generator(at::Generator generator)
      : GeneratorImpl(own_device(), c10::DispatchKeySet(kKey)), inner(std::move(generator)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_offset(uint64_t) override {}
  uint64_t get_offset() const override { return 0; }
  void set_state(const c10::TensorImpl& state) override {
    inner.unsafeGetGeneratorImpl()->set_state(state);
  }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    return inner.unsafeGetGeneratorImpl()->get_state();
  }
  Generator* clone_impl() const override { return new Generator(inner.clone()); }
};
const at::Generator& default_generator() {
  static at::Generator one = at::make_generator<Generator>(at::detail::createCPUGenerator(0));
  return one;
}
at::Generator inner_generator(const at::Generator& generator) {
  TORCH_CHECK(generator.device().type() == kType,
              "a generator of ", generator.device(), " for a tensor of the device");
  return static_cast<Generator*>(generator.unsafeGetGeneratorImpl())->inner;
}

struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return own_index() + 1; }
  c10::DeviceIndex deviceCount() const override { return own_index() + 1; }
  c10::DeviceIndex current_device() const override { return own_index(); }
  c10::DeviceIndex getCurrentDevice() const override { return own_index(); }
  void setCurrentDevice(c10::DeviceIndex index) const override { check_own({kType, index}); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return own_index(); }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return own_index(); }
  void deviceSynchronize(c10::DeviceIndex) const override { host_waits("synchronize device"); }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    return default_generator();
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override {
    return at::make_generator<Generator>(at::detail::createCPUGenerator());
  }
  c10::Device getDeviceFromPtr(void*) const override { return own_device(); }
  bool isPinnedPtr(const void* memory) const override { return is_pinned_memory(memory); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &allocator; }
};

// ---- the same memory under the other device's name
bool is_ours(const at::Tensor& t) { return t.defined() && t.device().type() == kType; }

struct Loan { c10::Storage lender; int64_t counted; };
void end_loan(void* context) {
  auto* loan = static_cast<Loan*>(context);
  count(-loan->counted);
  delete loan;
}

at::Tensor over(c10::Storage storage, c10::DispatchKey key, const at::Tensor& like) {
  auto made = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_storage_offset(like.storage_offset());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides());
  return made;
}

// `is_new`: a CPU kernel has made the tensor for us.
at::Tensor renamed(const at::Tensor& t, c10::Device to, bool is_new = false) {
  auto* loan = new Loan{t.storage(), is_new ? in_blocks(t.storage().nbytes()) : 0};
  count(loan->counted);
  c10::DataPtr pointer(const_cast<void*>(t.storage().data()), loan, &end_loan, to);
  auto* by = to.is_cpu() ? c10::GetCPUAllocator() : static_cast<c10::Allocator*>(&allocator);
  c10::Storage storage(c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), t.storage().nbytes(), std::move(pointer), by,
      /*resizable=*/true));
  auto made = over(std::move(storage), to.is_cpu() ? c10::DispatchKey::CPU : kKey, t);
  made._set_conj(t.is_conj());
  made._set_neg(t.is_neg());
  if (t.unsafeGetTensorImpl()->is_wrapped_number())
    made.unsafeGetTensorImpl()->set_wrapped_number(true);
  return made;
}
at::Tensor on_host(const at::Tensor& t) { return is_ours(t) ? renamed(t, kHost) : t; }

// ---- every operator that has no kernel below: torch's CPU kernel, on renamed operands
// The shape of the result, or a Python value, depends on numbers of the device.
const std::set<std::string> kWaits = {
    "aten::_local_scalar_dense", "aten::is_nonzero", "aten::equal", "aten::nonzero",
    "aten::nonzero.out", "aten::masked_select", "aten::masked_select.out", "aten::_unique",
    "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::bincount",
    "aten::histc", "aten::repeat_interleave.Tensor"};
// The only operators that take indices of the host; masks become indices.
const std::set<std::string> kIndexed = {
    "aten::index.Tensor", "aten::index.Tensor_out", "aten::_unsafe_index.Tensor",
    "aten::index_put_", "aten::_index_put_impl_"};

struct Call {
  std::string name;
  bool waits, is_indexed;
  // Ours, and the same memory as a CPU tensor.
  std::vector<std::pair<at::Tensor, at::Tensor>> operands;

  at::Tensor operand(const at::Tensor& t, bool may_be_host) {
    if (!t.defined()) return t;
    if (!is_ours(t)) {
      TORCH_CHECK(may_be_host || t.dim() == 0,
                  "Expected all tensors to be on the same device, but found ", own_device(),
                  " and ", t.device(), ", a tensor of shape ", t.sizes(), " (in ", name, ")");
      return t;
    }
    TORCH_CHECK(t.layout() == c10::kStrided,
                "the second device has strided tensors only (in ", name, ")");
    for (auto& [ours, cpu] : operands) if (ours.is_same(t)) return cpu;
    operands.emplace_back(t, renamed(t, kHost));
    return operands.back().second;
  }
  at::Tensor index(const at::Tensor& t) {
    if (t.defined() && is_indexed) {
      if (t.scalar_type() == at::kBool || t.scalar_type() == at::kByte) waits = true;
      if (!is_ours(t)) host_waits("copy to the device, in " + name);
    }
    return operand(t, is_indexed);
  }
  at::Tensor result(const at::Tensor& t) {
    if (!t.defined() || !t.device().is_cpu()) return t;
    for (auto& [ours, cpu] : operands) if (cpu.is_same(t)) return follow_resize(ours, cpu);
    for (auto& [ours, cpu] : operands)
      if (t.has_storage() && t.storage().is_alias_of(cpu.storage()))
        return over(ours.storage(), kKey, t);
    return renamed(t, own_device(), /*is_new=*/true);
  }
  // A kernel may have resized an `out`.
  at::Tensor follow_resize(const at::Tensor& ours, const at::Tensor& cpu) {
    if (ours.sizes() != cpu.sizes() || ours.storage().data() != cpu.storage().data()) {
      at::native::resize_(ours, cpu.sizes());
      renamed(ours, kHost).copy_(cpu);
    }
    return ours;
  }
};

void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  const auto& overload = schema.overload_name();
  Call call{schema.name() + (overload.empty() ? "" : "." + overload), false, false, {}};
  call.waits = kWaits.count(call.name) > 0;
  call.is_indexed = kIndexed.count(call.name) > 0;
  const auto& arguments = schema.arguments();
  const size_t first = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); ++i) {
    IValue& value = (*stack)[first + i];
    if (value.isTensor()) {
      value = call.operand(value.toTensor(), false);
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(call.operand(t, false));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> list;
      for (const auto& t : value.toOptionalTensorVector())
        list.push_back(t ? std::optional<at::Tensor>(call.index(*t)) : std::nullopt);
      value = list;
    } else if (value.isDevice() && value.toDevice().type() == kType) {
      check_own(value.toDevice());
      value = kHost;
    } else if (value.isGenerator()) {
      value = inner_generator(value.toGenerator());
    } else if (value.isNone() &&
               arguments[i].type()->str().find("Generator") != std::string::npos) {
      value = inner_generator(default_generator());
    }
  }
  if (call.waits) host_waits(call.name);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t i = stack->size() - schema.returns().size(); i < stack->size(); ++i) {
    IValue& value = (*stack)[i];
    if (value.isTensor()) {
      value = call.result(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<at::Tensor> list;
      for (const at::Tensor& t : value.toTensorVector()) list.push_back(call.result(t));
      value = list;
    }
  }
  for (auto& [ours, cpu] : call.operands) call.follow_resize(ours, cpu);
}

// ---- collectives: gloo on the same memory; they return the tensors that they were given
IValue all_on_host(const IValue& value) {
  if (value.isTensor()) return on_host(value.toTensor());
  if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& t : value.toTensorVector()) list.push_back(on_host(t));
    return list;
  }
  if (!value.isList()) return value;
  c10::impl::GenericList list(value.toList().elementType());
  for (const IValue& item : value.toListRef()) list.push_back(all_on_host(item));
  return list;
}
void collective(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const size_t first = stack->size() - op.schema().arguments().size();
  const IValue given = (*stack)[first];
  for (size_t i = first; i < stack->size(); ++i) (*stack)[i] = all_on_host((*stack)[i]);
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i)
    if ((*stack)[i].isTensor() || (*stack)[i].isList()) (*stack)[i] = given;
}

// ---- operators that make, view or move memory
using MaybeType = std::optional<at::ScalarType>;
using MaybeLayout = std::optional<at::Layout>;
using MaybeDevice = std::optional<at::Device>;

at::Tensor empty(c10::SymIntArrayRef size, MaybeType type, MaybeLayout, MaybeDevice device,
                 std::optional<bool>, std::optional<at::MemoryFormat> format) {
  if (device) check_own(*device);
  const auto dtype = at::dtype_or_default(type);
  return at::detail::empty_generic_symint(
      size, &allocator, c10::DispatchKeySet(kKey), dtype, format);
}
at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, MaybeType type, MaybeLayout,
                         MaybeDevice device, std::optional<bool>) {
  if (device) check_own(*device);
  const auto dtype = at::dtype_or_default(type);
  return at::detail::empty_strided_generic(
      size, stride, &allocator, c10::DispatchKeySet(kKey), dtype);
}
at::Tensor& copy_(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.is_same(from)) return to;
  if (!is_ours(to) && !(non_blocking && to.is_pinned())) host_waits("copy to the host");
  if (!is_ours(from) && !(non_blocking && from.is_pinned())) host_waits("copy to the device");
  at::AutoDispatchBelowADInplaceOrView below;
  on_host(to).copy_(on_host(from));
  return to;
}
at::Tensor copy_and_resize(const at::Tensor& from, const at::Tensor& to) {
  at::native::resize_(to, from.sizes());
  at::Tensor target = to;
  return copy_(target, from, false);
}
at::Tensor& set_storage_at(at::Tensor& self, at::Storage storage, int64_t offset,
                           at::IntArrayRef size, at::IntArrayRef stride) {
  return at::native::set_storage_cpu_(self, std::move(storage), offset, size, stride);
}
at::Tensor& set_storage(at::Tensor& self, at::Storage storage) {
  const auto elements = static_cast<int64_t>(storage.nbytes() / self.itemsize());
  return set_storage_at(self, std::move(storage), 0, {elements}, {});
}

}  // namespace

TORCH_LIBRARY_IMPL(_, CUDA, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", TORCH_FN(empty));
  m.impl("empty_strided", TORCH_FN(empty_strided));
  m.impl("copy_", TORCH_FN(copy_));
  m.impl("_copy_from_and_resize", TORCH_FN(copy_and_resize));
  m.impl("view", TORCH_FN(at::native::view));
  m.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  m.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  m.impl("unfold", TORCH_FN(at::native::unfold));
  m.impl("resize_", TORCH_FN(at::native::resize_));
  m.impl("set_.source_Storage", TORCH_FN(set_storage));
  m.impl("set_.source_Storage_storage_offset", TORCH_FN(set_storage_at));
}

TORCH_LIBRARY_IMPL(c10d, CUDA, m) {
  for (const char* name :
       {"allreduce_", "allreduce_coalesced_", "broadcast_", "reduce_", "allgather_",
        "_allgather_base_", "allgather_coalesced_", "allgather_into_tensor_coalesced_",
        "reduce_scatter_", "_reduce_scatter_base_", "reduce_scatter_tensor_coalesced_", "gather_",
        "scatter_", "alltoall_", "alltoall_base_", "send", "recv_", "barrier"})
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&collective>());
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(kType, &allocator, 100);
  // torch made its hooks when it was imported, an object of the base class without data: replacing
  // its table of methods gives it ours.
  static Hooks hooks;
  const void* old_hooks = &at::detail::getCUDAHooks();
  std::memcpy(const_cast<void*>(old_hooks), &hooks, sizeof(void*));
  m.def("watch", [](py::object callback) {
    watcher = callback.is_none() ? nullptr : new py::object(callback);
  });
  m.def("host_waits", &host_waits);
  m.def("live_bytes", [] { return live_bytes; });
  m.def("peak_bytes", [] { return peak_bytes; });
  m.def("reset_peak", [] { peak_bytes = live_bytes; });
  m.def("on_host", &on_host);
  m.def("default_generator", [] { return default_generator(); });
}
