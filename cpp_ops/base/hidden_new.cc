// operator new and operator delete for macOS where the C++ library is linked in, as zig does. That
// library's are exported, and zig's linker takes no list of exports. These have the same names, by
// which the linker knows them, and are hidden; with all of them here, the library's are not linked.
#include <cstddef>
#include <cstdlib>
#include <new>

namespace {

void* TryAllocate(std::size_t size, std::size_t alignment) {
  if (alignment < 16) alignment = 16;
  for (;;) {
    void* memory = nullptr;
    if (posix_memalign(&memory, alignment, size > 0 ? size : 1) == 0) return memory;
    const std::new_handler handler = std::get_new_handler();
    if (!handler) return nullptr;
    handler();
  }
}

void* Allocate(std::size_t size, std::size_t alignment) {
  void* const memory = TryAllocate(size, alignment);
  if (!memory) throw std::bad_alloc();
  return memory;
}

void* AllocateOrNull(std::size_t size, std::size_t alignment) {
  try {
    return TryAllocate(size, alignment);
  } catch (const std::bad_alloc&) {  // of a handler
    return nullptr;
  }
}

}  // namespace

// A function under the symbol of an operator.
#define LUCID_OPERATOR(result, symbol, name, parameters, expression) \
  extern "C" result name parameters __asm__(symbol);                 \
  result name parameters { return expression; }

#define LUCID_NEW(name, symbol)                                                                   \
  LUCID_OPERATOR(void*, symbol, name, (std::size_t size), Allocate(size, 0))                      \
  LUCID_OPERATOR(void*, symbol "St11align_val_t", name##_aligned,                                 \
                 (std::size_t size, std::size_t alignment), Allocate(size, alignment))            \
  LUCID_OPERATOR(void*, symbol "RKSt9nothrow_t", name##_nothrow, (std::size_t size, const void*), \
                 AllocateOrNull(size, 0))                                                         \
  LUCID_OPERATOR(void*, symbol "St11align_val_tRKSt9nothrow_t", name##_aligned_nothrow,           \
                 (std::size_t size, std::size_t alignment, const void*),                          \
                 AllocateOrNull(size, alignment))

#define LUCID_DELETE(name, symbol)                                                               \
  LUCID_OPERATOR(void, symbol, name, (void* memory), std::free(memory))                          \
  LUCID_OPERATOR(void, symbol "m", name##_sized, (void* memory, std::size_t), std::free(memory)) \
  LUCID_OPERATOR(void, symbol "St11align_val_t", name##_aligned, (void* memory, std::size_t),    \
                 std::free(memory))                                                              \
  LUCID_OPERATOR(void, symbol "mSt11align_val_t", name##_sized_aligned,                          \
                 (void* memory, std::size_t, std::size_t), std::free(memory))                    \
  LUCID_OPERATOR(void, symbol "RKSt9nothrow_t", name##_nothrow, (void* memory, const void*),     \
                 std::free(memory))                                                              \
  LUCID_OPERATOR(void, symbol "St11align_val_tRKSt9nothrow_t", name##_aligned_nothrow,           \
                 (void* memory, std::size_t, const void*), std::free(memory))

LUCID_NEW(lucid_hidden_new, "__Znwm")
LUCID_NEW(lucid_hidden_new_array, "__Znam")
LUCID_DELETE(lucid_hidden_delete, "__ZdlPv")
LUCID_DELETE(lucid_hidden_delete_array, "__ZdaPv")
