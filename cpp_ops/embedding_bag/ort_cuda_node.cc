#include "embedding_bag/ort_cuda_node.h"

#include <atomic>
#include <cstddef>
#include <cstdio>

#include "c_api_cuda.h"

namespace lucid {
namespace ort {

namespace {

constexpr uintptr_t kAlignment = 256;  // of scratch memory

std::mutex g_nodes_mutex;
CudaNode* g_nodes = nullptr;
thread_local int64_t t_session = 0;

}  // namespace

CudaNode::~CudaNode() {
  if (listed_) {
    const std::lock_guard<std::mutex> lock(g_nodes_mutex);
    for (CudaNode** node = &g_nodes; *node; node = &(*node)->next_) {
      if (*node != this) continue;
      *node = next_;
      break;
    }
  }
  for (const auto& entry : entries_) {
    entry->bounds.Free();  // waits for the device
    for (const CudaBlock& block : entry->kept) Free(block);
  }
}

Status* CudaNode::Init(const Runtime& runtime, const char* op_name) {
  api_ = runtime.api;
  op_name_ = op_name;
  asked_ = runtime.bounds_check == BoundsCheck::kRun;
  deferred_ = asked_ || runtime.bounds_check == BoundsCheck::kDeferred;
  session_ = t_session;
  int device = 0;
  lucid::Status status = CurrentCudaDevice(&device);
  if (status.ok()) status = Add(device);
  if (!status.ok()) return ort::ToOrt(api_, op_name_, status);
  const std::lock_guard<std::mutex> lock(g_nodes_mutex);
  next_ = g_nodes;
  g_nodes = this;
  listed_ = true;
  return nullptr;
}

void CudaNode::StartSession(int64_t session) { t_session = session; }

lucid::Status CudaNode::Poll(int64_t session, bool wait, bool mine) {
  lucid::Status first;
  const std::lock_guard<std::mutex> lock(g_nodes_mutex);
  for (const CudaNode* node = g_nodes; node; node = node->next_) {
    // A run that does not defer has reported what it found.
    if (!node->deferred_ || (session != 0 && node->session_ != session)) continue;
    const lucid::Status status = node->PollEntries(wait, mine);
    if (status.ok() || !first.ok()) continue;
    first = Error(status.code, "%s: %s", node->op_name_, status.message);
  }
  return first;
}

lucid::Status CudaNode::PollEntries(bool wait, bool mine) const {
  lucid::Status first;
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::thread::id thread = std::this_thread::get_id();
  for (const auto& entry : entries_) {
    if (mine && entry->thread != thread) continue;
    const lucid::Status status = entry->bounds.Poll(wait);
    if (first.ok()) first = status;
  }
  for (size_t i = left_.size(); i-- > 0;) {
    if (mine && left_[i].first != thread) continue;
    if (first.ok()) first = left_[i].second;
    left_.erase(left_.begin() + static_cast<std::ptrdiff_t>(i));
  }
  return first;
}

// The caller holds the mutex, or is alone.
lucid::Status CudaNode::Add(int device) const {
  auto entry = std::make_unique<Entry>();
  entries_.reserve(entries_.size() + 1);  // so that nothing can throw once there is device memory
  const lucid::Status status = entry->bounds.Allocate(device);
  if (status.ok()) entries_.push_back(std::move(entry));
  return status;
}

// A bounds error for this run: used by one run at a time or, if deferred, by one stream.
lucid::Status CudaNode::Take(void* stream, int device, Entry** entry) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  Entry* found = nullptr;
  for (const auto& e : entries_) {
    if (e->bounds.device_id != device) continue;
    if (deferred_ && e->taken && e->stream == stream) {
      *entry = e.get();
      return Leave(e.get());
    }
    if (!e->taken && !found) found = e.get();
  }
  if (!found) {
    const lucid::Status status = Add(device);
    if (!status.ok()) return status;
    found = entries_.back().get();
  }
  found->taken = true;
  found->stream = stream;
  found->thread = std::this_thread::get_id();
  *entry = found;
  return lucid::Status();
}

// An entry changes from one thread to another, whose run on its stream is over. What that one has
// yet to ask for is put aside for it. The caller holds the mutex.
lucid::Status CudaNode::Leave(Entry* entry) const {
  const std::thread::id before = entry->thread;
  entry->thread = std::this_thread::get_id();
  if (!asked_ || before == entry->thread) return lucid::Status();
  const volatile LucidBoundsError* host = entry->bounds.host;
  if (host->inverse == 0) return lucid::Status();
  left_.emplace_back(before, BoundsStatus(*entry->bounds.host));
  *entry->bounds.host = LucidBoundsError();
  return entry->bounds.Clear(entry->stream);
}

void CudaNode::GiveBack(Entry* entry) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!deferred_) entry->taken = false;
}

void CudaNode::Free(const CudaBlock& block) const {
  if (block.memory) block.allocator->Free(block.allocator, block.memory);
  Call<ReleaseAllocator>(api_, block.allocator);
}

CudaRun::~CudaRun() {
  for (const CudaBlock& block : memory_) {
    // Allocate made room for it.
    if (entry_ && node_.deferred_ && block.memory) {
      entry_->kept.push_back(block);
    } else {
      node_.Free(block);
    }
  }
  if (entry_) node_.GiveBack(entry_);
}

Status* CudaRun::ToOrt(const lucid::Status& status) const {
  return ort::ToOrt(node_.api_, node_.op_name_, status);
}

Status* CudaRun::Begin(const Value* beside) {
  const MemoryInfo* info = nullptr;
  int device = 0;
  LUCID_RETURN_IF_ERROR(Call<GetTensorMemoryInfo>(node_.api_, beside, &info));
  LUCID_RETURN_IF_ERROR(Call<MemoryInfoGetId>(node_.api_, info, &device));
  LUCID_RETURN_IF_ERROR(Call<KernelContext_GetGPUComputeStream>(node_.api_, context_, &stream_));
  LUCID_RETURN_IF_ERROR(ToOrt(IsCudaCapturing(stream_, &capturing_)));
  if (capturing_ && !node_.deferred_) {
    return ToOrt(InvalidArgument(
        "a CUDA graph cannot record a run that waits for the device: set the session "
        "configuration lucid.bounds_check to deferred"));
  }
  LUCID_RETURN_IF_ERROR(ToOrt(node_.Take(stream_, device, &entry_)));
  const bool reports = node_.deferred_ && !node_.asked_ && !capturing_;
  return reports ? ToOrt(ReportEarlier()) : nullptr;
}

// Memory that an earlier run on this stream used, whose kernels come before those of this one: the
// smallest that suffices.
bool CudaRun::TakeKept(int64_t bytes) {
  std::vector<CudaBlock>& kept = entry_->kept;
  size_t best = kept.size();
  for (size_t i = 0; i < kept.size(); ++i) {
    if (kept[i].bytes >= bytes && (best == kept.size() || kept[i].bytes < kept[best].bytes)) {
      best = i;
    }
  }
  if (best == kept.size()) return false;
  memory_.push_back(kept[best]);
  kept[best] = kept.back();
  kept.pop_back();
  return true;
}

Status* CudaRun::Allocate(const Value* beside, int64_t bytes, void** memory) {
  *memory = nullptr;
  if (bytes == 0) return nullptr;
  // So that nothing can throw between here and there, nor in the destructor.
  memory_.reserve(memory_.size() + 1);
  entry_->kept.reserve(entry_->kept.size() + memory_.size() + 1);
  if (!TakeKept(bytes)) {
    if (node_.deferred_ && !capturing_ && !entry_->kept.empty()) {
      // They are too small. This is rare: the next ones have room for a quarter more than asked.
      LUCID_RETURN_IF_ERROR(ToOrt(WaitForCudaStream(stream_)));
      for (const CudaBlock& block : entry_->kept) node_.Free(block);
      entry_->kept.clear();
    }
    const int64_t size = node_.deferred_ ? bytes + bytes / 4 : bytes;
    const MemoryInfo* info = nullptr;
    Allocator* allocator = nullptr;
    LUCID_RETURN_IF_ERROR(Call<GetTensorMemoryInfo>(node_.api_, beside, &info));
    LUCID_RETURN_IF_ERROR(Call<KernelContext_GetAllocator>(node_.api_, context_, info, &allocator));
    memory_.push_back({allocator, nullptr, size});
    memory_.back().memory = allocator->Alloc(allocator, static_cast<size_t>(size) + kAlignment);
  }
  void* const block = memory_.back().memory;
  if (!block) {
    char text[80];
    std::snprintf(text, sizeof(text), "no %lld bytes of scratch memory on the device",
                  static_cast<long long>(bytes));
    return Call<CreateStatus>(node_.api_, kFail, text);
  }
  const uintptr_t p = reinterpret_cast<uintptr_t>(block);
  *memory = reinterpret_cast<void*>((p + kAlignment - 1) / kAlignment * kAlignment);
  return nullptr;
}

Status* CudaRun::Read(const int64_t* device, int64_t* value) {
  if (capturing_) {
    return ToOrt(InvalidArgument(
        "a CUDA graph cannot record a run whose output sizes are computed on the device"));
  }
  lucid::Status status = ReadFromDevice(device, value, stream_);
  if (status.ok()) status = Wait();
  return ToOrt(status);
}

// If deferred: the bounds error of an earlier run.
lucid::Status CudaRun::ReportEarlier() const {
  const CudaBounds& bounds = entry_->bounds;
  const volatile LucidBoundsError* host = bounds.host;
  if (host->inverse == 0) return lucid::Status();
  // Copies of it may be under way still, and this is the rare case.
  lucid::Status status = WaitForCudaStream(stream_);
  if (!status.ok()) return status;
  const lucid::Status error = BoundsStatus(*bounds.host);
  *bounds.host = LucidBoundsError();
  status = bounds.Clear(stream_);
  return status.ok() ? error : status;
}

// The bounds error of this run.
lucid::Status CudaRun::Wait() const {
  const CudaBounds& bounds = entry_->bounds;
  lucid::Status status = bounds.CopyToHost(stream_);
  if (status.ok()) status = WaitForCudaStream(stream_);
  if (!status.ok()) return status;
  const lucid::Status error = BoundsStatus(*bounds.host);
  if (error.ok()) return error;
  *bounds.host = LucidBoundsError();
  status = bounds.Clear(stream_);
  if (status.ok()) status = WaitForCudaStream(stream_);  // another stream may take it next
  return status.ok() ? error : status;
}

Status* CudaRun::End(const lucid::Status& launched) {
  if (!launched.ok()) return ToOrt(launched);
  return ToOrt(node_.deferred_ ? entry_->bounds.CopyToHost(stream_) : Wait());
}

}  // namespace ort
}  // namespace lucid

extern "C" {

int64_t lucid_cuda_begin_session(void) {
  static std::atomic<int64_t> sessions{0};
  const int64_t session = ++sessions;
  lucid::ort::CudaNode::StartSession(session);
  return session;
}

void lucid_cuda_end_session(void) { lucid::ort::CudaNode::StartSession(0); }

int lucid_cuda_check_bounds(int64_t session, char* message, size_t message_size) {
  const lucid::Status status = lucid::ort::CudaNode::Poll(session, true, false);
  if (message_size > 0) std::snprintf(message, message_size, "%s", status.message);
  return static_cast<int>(status.code);
}

int lucid_cuda_check_run(int64_t session, int wait, char* message, size_t message_size) {
  const lucid::Status status = lucid::ort::CudaNode::Poll(session, wait != 0, true);
  if (message_size > 0) std::snprintf(message, message_size, "%s", status.message);
  return static_cast<int>(status.code);
}

}  // extern "C"
