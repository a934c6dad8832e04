// What C and C++ bring elsewhere: memory. There is no operating system below and no other library.
//
// Memory grows and is never given back: a network is an instance of its own, and goes with it. Blocks that were freed
// are used again for others of their size class, of which each octave has four.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

extern "C" unsigned char __heap_base;  // of the linker: where nothing lies any more

namespace {

constexpr uint32_t kLine = 64;  // alignment of what is handed out
constexpr uint32_t kPage = 65536;
constexpr uint32_t kMaxMemory = 0x7fff0000;  // addresses that are the same number with and without a sign

// Before each block, in the last bytes of the line before.
struct Header {
  uint32_t size_class;
  Header* next;  // where free
  uint32_t unused[2];
};
static_assert(sizeof(Header) == 16, "the block after it begins a line");

constexpr uint32_t kNumClasses = 128;
Header* free_blocks[kNumClasses];
uint32_t next_block;

// The smallest class that holds so many lines, 1 <= lines < 2^25, and how many it holds.
uint32_t size_class_of(uint32_t lines, uint32_t* held) {
  if (lines <= 4) {
    *held = lines;
    return lines;
  }
  const uint32_t octave = 31 - static_cast<uint32_t>(__builtin_clz(lines - 1));  // 2^octave < lines <= 2^(octave + 1)
  const uint32_t step = 1u << (octave - 2);
  const uint32_t steps = (lines - (1u << octave) + step - 1) / step;  // 1 to 4
  *held = (1u << octave) + steps * step;
  return 4 * (octave - 1) + steps;
}

}  // namespace

extern "C" {

__attribute__((export_name("malloc"))) void* malloc(size_t size) {
  if (size > kMaxMemory) return nullptr;
  uint32_t lines;
  // A block is its lines less the header of the one that follows.
  const uint32_t size_class = size_class_of((static_cast<uint32_t>(size) + sizeof(Header) + kLine - 1) / kLine, &lines);
  if (Header* const block = free_blocks[size_class]) {
    free_blocks[size_class] = block->next;
    return block + 1;
  }
  if (!next_block) {
    const uint32_t base = static_cast<uint32_t>(reinterpret_cast<uintptr_t>(&__heap_base));
    next_block = (base + sizeof(Header) + kLine - 1) / kLine * kLine - static_cast<uint32_t>(sizeof(Header));
  }
  const uint64_t end = next_block + static_cast<uint64_t>(lines) * kLine;
  if (end > kMaxMemory) return nullptr;
  const uint32_t pages = (static_cast<uint32_t>(end) + kPage - 1) / kPage;
  const uint32_t have = __builtin_wasm_memory_size(0);
  if (pages > have && __builtin_wasm_memory_grow(0, pages - have) == SIZE_MAX) return nullptr;
  Header* const block = reinterpret_cast<Header*>(next_block);
  next_block = static_cast<uint32_t>(end);
  block->size_class = size_class;
  return block + 1;
}

__attribute__((export_name("free"))) void free(void* memory) {
  if (!memory) return;
  Header* const block = static_cast<Header*>(memory) - 1;
  block->next = free_blocks[block->size_class];
  free_blocks[block->size_class] = block;
}

// One instruction each, of WebAssembly's bulk memory.
void* memcpy(void* to, const void* from, size_t size) { return __builtin_memcpy(to, from, size); }
void* memmove(void* to, const void* from, size_t size) { return __builtin_memmove(to, from, size); }
void* memset(void* to, int value, size_t size) { return __builtin_memset(to, value, size); }

int memcmp(const void* a, const void* b, size_t size) {
  const unsigned char *x = static_cast<const unsigned char*>(a), *y = static_cast<const unsigned char*>(b);
  for (; size; --size, ++x, ++y)
    if (*x != *y) return *x - *y;
  return 0;
}

// What a class without this function would call.
void __cxa_pure_virtual() { __builtin_trap(); }

}  // extern "C"

// Without exceptions there is nobody to tell that memory has run out: the instance ends, and JavaScript gets an error.
void* operator new(size_t size) {
  void* const memory = malloc(size);
  if (!memory) __builtin_trap();
  return memory;
}
void* operator new[](size_t size) { return operator new(size); }
void* operator new(size_t size, const std::nothrow_t&) noexcept { return malloc(size); }
void* operator new[](size_t size, const std::nothrow_t&) noexcept { return malloc(size); }
void operator delete(void* memory) noexcept { free(memory); }
void operator delete[](void* memory) noexcept { free(memory); }
void operator delete(void* memory, size_t) noexcept { free(memory); }
void operator delete[](void* memory, size_t) noexcept { free(memory); }
