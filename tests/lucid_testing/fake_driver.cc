// libcuda.so.1 for rehearsals without a GPU: as much of the driver's interface as
// tests/lucid_testing/driver.py calls, over memory of the host. What is recorded is recorded by the
// emulated kernels' library, whose functions fake_connect names.
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#define API extern "C" __attribute__((visibility("default"))) int

namespace {
void (*g_record)();
int (*g_stop)();
void (*g_replay)(int);
bool g_recording = false;
}  // namespace

extern "C" __attribute__((visibility("default"))) void fake_connect(void (*record)(), int (*stop)(),
                                                                    void (*replay)(int)) {
  g_record = record;
  g_stop = stop;
  g_replay = replay;
}

API cuInit(unsigned) { return 0; }
API cuDriverGetVersion(int* version) { return *version = 13000, 0; }
API cuDeviceGetCount(int* count) { return *count = 1, 0; }
API cuDeviceGet(int* device, int) { return *device = 0, 0; }
API cuDeviceGetName(char* name, int size, int) { return std::snprintf(name, size, "emulated"), 0; }
API cuDeviceGetAttribute(int* value, int, int) { return *value = 9, 0; }
API cuDevicePrimaryCtxRetain(void** context, int) { return *context = &g_record, 0; }
API cuCtxSetCurrent(void*) { return 0; }
API cuMemGetInfo_v2(size_t* free, size_t* total) { return *free = *total = size_t{1} << 28, 0; }
API cuMemAlloc_v2(uint64_t* p, size_t bytes) {
  void* const memory = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  *p = reinterpret_cast<uintptr_t>(memory);
  return memory ? 0 : 2;
}
API cuMemFree_v2(uint64_t p) { return std::free(reinterpret_cast<void*>(p)), 0; }
API cuMemcpyHtoD_v2(uint64_t to, const void* from, size_t bytes) {
  return std::memcpy(reinterpret_cast<void*>(to), from, bytes), 0;
}
API cuMemcpyDtoH_v2(void* to, uint64_t from, size_t bytes) {
  return std::memcpy(to, reinterpret_cast<const void*>(from), bytes), 0;
}
API cuMemcpyDtoDAsync_v2(uint64_t to, uint64_t from, size_t bytes, void*) {
  return std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), bytes), 0;
}
API cuMemsetD8Async(uint64_t p, unsigned char value, size_t bytes, void*) {
  return std::memset(reinterpret_cast<void*>(p), value, bytes), 0;
}
API cuStreamCreate(void** stream, unsigned) { return *stream = std::malloc(1), 0; }
API cuStreamSynchronize(void*) { return 0; }
API cuStreamBeginCapture_v2(void*, int) { return g_recording = true, g_record(), 0; }
API cuStreamEndCapture(void*, void** graph) {
  g_recording = false;
  return *graph = reinterpret_cast<void*>(static_cast<intptr_t>(g_stop() + 1)), 0;
}
API cuGraphInstantiateWithFlags(void** executable, void* graph, unsigned long long) {
  return *executable = graph, 0;
}
API cuGraphLaunch(void* executable, void*) {
  return g_replay(static_cast<int>(reinterpret_cast<intptr_t>(executable)) - 1), 0;
}
API cuEventCreate(void** event, unsigned) { return *event = std::malloc(sizeof(double)), 0; }
API cuEventRecord(void* event, void*) {
  *static_cast<double*>(event) =
      std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now().time_since_epoch())
          .count();
  return 0;
}
API cuEventSynchronize(void*) { return 0; }
API cuEventElapsedTime(float* milliseconds, void* begin, void* end) {
  return *milliseconds =
             static_cast<float>(*static_cast<double*>(end) - *static_cast<double*>(begin)),
         0;
}
API cuModuleLoadData(void** module, const void* text) {
  return *module = nullptr, std::strstr(static_cast<const char*>(text), "gather") ? 0 : 218;
}
API cuModuleGetFunction(void** function, void*, const char* name) {
  return *function = nullptr, std::strcmp(name, "gather") == 0 ? 0 : 500;
}
API cuLaunchKernel(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned,
                   void*, void**, void**) {
  return 0;
}
API cuGetErrorString(int error, const char** text) {
  return *text = error == 2 ? "out of memory" : "an error", 0;
}
