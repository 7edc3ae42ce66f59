// The machine that PTX runs on: warps of 32 lanes with registers in rows of 32, shared and global memory that know who
// touched each byte last, and a table of instructions by their PTX names.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace ptx {

constexpr int LANES = 32;
constexpr uint32_t ALL = 0xFFFFFFFFu;

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, uint32_t lanes);

// An operand is a register (byte offset into the warp's file, width in bytes above bit 32), or a number; an address is
// two operands, a register and a number.
struct Instruction {
  Handler run = nullptr;
  int kind = 0;          // what the scheduler does itself, else PLAIN
  int64_t guard = -1;    // offset of a predicate, or -1
  bool negated = false;  // of the guard
  const int64_t* o = nullptr;
  int count = 0;  // of the operands
};

enum Kind { PLAIN, BRANCH, EXIT, BARRIER };

[[noreturn]] void fail(const std::string& what);
std::string text_of(const Warp& w, int lane);  // thread and block
[[noreturn]] void fail_lane(const Warp& w, int lane, const std::string& what);

// Who read and wrote the bytes of an array last, and when (a count of instructions): a race is an access that nothing
// orders after another thread's, where one of the two is a write.
struct Shadow {
  enum Readers : uint8_t { ONE_THREAD, ONE_WARP, ONE_BLOCK, MANY_BLOCKS };
  struct Cell {
    uint32_t writer = 0, written = 0;  // thread + 1 of the launch
    uint32_t reader = 0, read = 0;
    Readers readers = ONE_THREAD;
    uint8_t pending = 0;     // copies on their way here (cp.async)
    bool registers = false;  // written from registers (not by cp.async), which wgmma only sees after a proxy fence
  };
  std::vector<Cell> cells;
  bool shared = false;
};

struct Region {
  uint64_t base = 0, size = 0;
  uint8_t* data = nullptr;
  const uint8_t* allowed = nullptr;  // 1 for bytes that belong to the array's elements
  Shadow* shadow = nullptr;
  uint64_t shadow_offset = 0;
  std::string name;
};

struct Copy {  // one lane's cp.async
  int lane;
  uint32_t target, size;
  uint8_t data[16];
};

struct MatrixStep {  // one wgmma.mma_async that has been issued
  const Instruction* instruction;
  uint64_t a, b;
  bool add;
  uint32_t issued;
};

struct Block;

struct Path {  // lanes that are at the same instruction
  int at;
  uint32_t lanes;
};

struct Warp {
  Block* block = nullptr;
  int number = 0;
  std::vector<uint8_t> file;
  std::vector<uint8_t> local;  // memory of each lane's own
  std::vector<Path> paths;
  uint32_t waiting = 0;  // lanes at a barrier
  int barrier = 0, resume = 0;
  uint32_t alive = ALL;
  uint32_t synced = 0;                               // time of the last bar.warp.sync
  uint32_t fenced = 0;                               // time of the last fence.proxy.async
  uint32_t waited = 0;                               // lanes that have been through griddepcontrol.wait
  std::vector<std::vector<Copy>> copies{1};          // groups of cp.async, the last one open
  std::vector<std::vector<MatrixStep>> products{1};  // groups of wgmma, the last one open

  template <class T>
  T* reg(int64_t operand) {
    return reinterpret_cast<T*>(file.data() + static_cast<uint32_t>(operand));
  }
  uint32_t thread(int lane) const;
};

using View = std::map<uint32_t, uint32_t>;  // block -> up to which time what it did is seen

inline void add_view(View& to, const View& from) {
  for (const auto& [block, time] : from)
    to[block] = std::max(to[block], time);
}

struct Launch {
  std::vector<Region> regions;
  std::vector<uint8_t> parameters;
  uint32_t grid[3] = {1, 1, 1};
  uint32_t threads = 0;
  uint32_t time = 1;
  bool backwards = false;             // blocks and warps in the opposite order
  bool real_addresses = false;        // of the arrays, which are sorted by them
  bool overlaps = false;              // with the end of the kernel before it, until griddepcontrol.wait
  std::map<uint64_t, View> released;  // by atomics at an address
  std::vector<std::string> hazards;   // races in global memory
};

struct Block {
  Launch* launch = nullptr;
  uint32_t number = 0;
  uint32_t at[3] = {0, 0, 0};
  std::vector<uint8_t> shared;
  Shadow shadow;
  uint32_t released = 0;              // time of the last barrier
  View view;                          // of the other blocks, by the whole block
  std::map<uint32_t, View> acquired;  // by a thread since the last barrier
  std::vector<Warp> warps;
};

inline uint32_t Warp::thread(int lane) const {
  return block->number * block->launch->threads + number * LANES + lane + 1;
}

inline int width_of(int64_t operand) { return static_cast<int>(operand >> 32); }

// The low bytes of a register of any width, zero above.
inline uint64_t any_register(Warp& w, int64_t operand, int lane) {
  switch (width_of(operand)) {
  case 2: return w.reg<uint16_t>(operand)[lane];
  case 4: return w.reg<uint32_t>(operand)[lane];
  default: return w.reg<uint64_t>(operand)[lane];
  }
}

inline void set_any_register(Warp& w, int64_t operand, int lane, uint64_t value) {
  switch (width_of(operand)) {
  case 2: w.reg<uint16_t>(operand)[lane] = static_cast<uint16_t>(value); break;
  case 4: w.reg<uint32_t>(operand)[lane] = static_cast<uint32_t>(value); break;
  default: w.reg<uint64_t>(operand)[lane] = value;
  }
}

// Memory (memory.cpp, watch.cpp). `async`: by cp.async or wgmma, not from or to registers.
void touch_read(Warp& w, int lane, Shadow& shadow, uint64_t at, uint64_t size, const char* where, bool async = false);
void touch_write(
    Warp& w, int lane, Shadow& shadow, uint64_t at, const uint8_t* old, const uint8_t* now, uint64_t size,
    const char* where, bool async = false
);
uint8_t* shared_bytes(Warp& w, int lane, uint64_t address, uint64_t size);
void read_shared(Warp& w, int lane, uint64_t address, uint64_t size, void* to, bool async = false);
void write_shared(Warp& w, int lane, uint64_t address, uint64_t size, const void* from);

// Instructions by name; the signature has one letter per operand: h, w, x registers of 2, 4, 8 bytes, p a predicate,
// v a register of any width, a an address, i a number.
struct Entry {
  Handler run;
  std::string signature;
  int kind = PLAIN;
};
using Table = std::map<std::string, Entry>;

void add_arithmetic(Table& table);
void add_conversions(Table& table);
void add_memory(Table& table);
void add_matrices(Table& table);

}  // namespace ptx
