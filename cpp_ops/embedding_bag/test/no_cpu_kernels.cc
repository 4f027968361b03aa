// For tests of the emulated CUDA kernels: the functions of the CPU's kernels that the adapters
// call, without the time that those take to compile, which are never called; and the emulated
// machine's numbers.
#include <functional>
#include <utility>
#include <vector>

#include "embedding_bag/embedding_bag.h"
#include "embedding_bag/test/cuda_emulation.h"
#include "embedding_bag_grad/embedding_bag_grad.h"

namespace lucid {

static Status NoKernels() { return Error(Code::kInternal, "this library has no CPU kernels"); }

Status CheckOffsets(const EmbeddingBagArgs&, int64_t*) { return NoKernels(); }
Status RunCheckedEmbeddingBag(const EmbeddingBagArgs&, int64_t, int64_t, Isa, const ParallelFor&) {
  return NoKernels();
}
Status CheckCollectionOffsets(const EmbeddingBagCollectionArgs&, int64_t*) { return NoKernels(); }
Status RunCheckedEmbeddingBagCollection(const EmbeddingBagCollectionArgs&, const CollectionSizes&,
                                        const int64_t*, Isa, const ParallelFor&) {
  return NoKernels();
}
Status CheckGradOffsets(const EmbeddingBagGradArgs&, int64_t, GradSizes*) { return NoKernels(); }
int64_t CountCheckedGradEntries(const EmbeddingBagGradArgs&, const GradSizes&) { return 0; }
Status RunCheckedEmbeddingBagGrad(const EmbeddingBagGradArgs&, const GradSizes&, Isa,
                                  const ParallelFor&) {
  return NoKernels();
}

}  // namespace lucid

extern "C" {

// A number of the emulated machine; see Machine in cuda_emulation.h. -1: there is none of that
// name.
__attribute__((visibility("default"))) int64_t lucid_emulation_get(const char* name) {
  const std::atomic<int64_t>* const number = lucid::emulation::Machine::Get().Find(name);
  return number ? number->load() : -1;
}
__attribute__((visibility("default"))) void lucid_emulation_set(const char* name, int64_t value) {
  if (std::atomic<int64_t>* const number = lucid::emulation::Machine::Get().Find(name))
    *number = value;
}

// The current device of this thread.
__attribute__((visibility("default"))) int lucid_emulation_device(int device) {
  const int before = lucid::emulation::HostThread::Get().device;
  lucid::emulation::HostThread::Get().device = device;
  return before;
}

// Starts recording; stops it, and returns the number of what was recorded; does that again.
__attribute__((visibility("default"))) void lucid_emulation_record() {
  lucid::emulation::Recorder::Get().recording = true;
}
static std::vector<std::vector<std::function<void()>>> g_recorded;
__attribute__((visibility("default"))) int lucid_emulation_stop() {
  lucid::emulation::Recorder& recorder = lucid::emulation::Recorder::Get();
  recorder.recording = false;
  g_recorded.push_back(std::move(recorder.work));
  recorder.work.clear();
  return static_cast<int>(g_recorded.size()) - 1;
}
__attribute__((visibility("default"))) void lucid_emulation_replay(int number) {
  for (const auto& work : g_recorded[static_cast<size_t>(number)]) work();
}

}  // extern "C"
