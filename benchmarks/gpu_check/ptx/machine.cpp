// Runs a program: blocks one after the other, the warps of a block in turn up to a barrier, the lanes of a warp that
// have parted by the smallest address first. And the C interface.
#include "machine.h"

#include <algorithm>
#include <climits>

namespace ptx {

struct Program {
  std::vector<Instruction> instructions;
  std::vector<int64_t> operands;
  uint64_t local = 0;             // bytes of a lane's own memory
  std::vector<uint8_t> file;      // a warp's registers as they begin, constants among them
  std::vector<int64_t> specials;  // where tid x y z, ctaid x y z, ntid x y z, nctaid x y z, laneid lie, or -1
};

namespace {

int64_t current = 0;  // the instruction, for messages

const Table& table() {
  static const Table all = [] {
    Table t;
    add_arithmetic(t);
    add_conversions(t);
    add_memory(t);
    add_matrices(t);
    t["bra"] = {nullptr, "i", BRANCH};
    t["ret"] = {nullptr, "", EXIT};
    t["exit"] = {nullptr, "", EXIT};
    t["bar.sync"] = {nullptr, "i", BARRIER};
    return t;
  }();
  return all;
}

const std::vector<const Table::value_type*>& entries() {
  static const auto all = [] {
    std::vector<const Table::value_type*> list;
    for (const auto& entry : table())
      list.push_back(&entry);
    return list;
  }();
  return all;
}

void add_path(Warp& w, int at, uint32_t lanes) {
  for (Path& path : w.paths)
    if (path.at == at) {
      path.lanes |= lanes;
      return;
    }
  w.paths.push_back({at, lanes});
}

// Until every lane waits or has ended. Lanes that have parted: the smallest address first.
void run_warp(Warp& w, const Program& program, uint64_t& left) {
  while (!w.paths.empty()) {
    const auto first = std::min_element(w.paths.begin(), w.paths.end(), [](auto& a, auto& b) { return a.at < b.at; });
    Path path = *first;
    w.paths.erase(first);
    int limit = INT_MAX;
    for (const Path& other : w.paths)
      limit = std::min(limit, other.at);
    while (path.lanes != 0) {
      if (path.at >= limit) {
        add_path(w, path.at, path.lanes);
        break;
      }
      current = path.at;
      if (left-- == 0) fail("still running after as many instructions as it may take");
      const Instruction& i = program.instructions[static_cast<size_t>(path.at)];
      ++w.block->launch->time;
      uint32_t lanes = path.lanes;
      if (i.guard >= 0) lanes &= i.negated ? ~*w.reg<uint32_t>(i.guard) : *w.reg<uint32_t>(i.guard);
      if (i.kind == PLAIN) {
        if (lanes != 0) i.run(w, i, lanes);
        ++path.at;
      } else if (i.kind == BRANCH) {
        const uint32_t stay = path.lanes & ~lanes;
        if (stay != 0 && lanes != 0) {
          add_path(w, path.at + 1, stay);
          add_path(w, static_cast<int>(i.o[0]), lanes);
          break;
        }
        path.at = lanes != 0 ? static_cast<int>(i.o[0]) : path.at + 1;
      } else if (i.kind == EXIT) {
        w.alive &= ~lanes;
        path.lanes &= ~lanes;
        ++path.at;
      } else {
        // Lanes that are elsewhere may still come here.
        if (w.waiting != 0 && w.resume != path.at + 1) fail("bar.sync in a part of a warp");
        w.waiting |= lanes;
        w.barrier = static_cast<int>(i.o[0]);
        w.resume = path.at + 1;
        path.lanes &= ~lanes;
        ++path.at;
      }
    }
  }
  if (w.waiting != 0 && w.waiting != w.alive) fail("bar.sync in a part of a warp");
}

void run_block(Block& block, const Program& program, uint64_t& left) {
  for (;;) {
    for (size_t n = 0; n < block.warps.size(); ++n) {
      Warp& w = block.warps[block.launch->backwards ? block.warps.size() - 1 - n : n];
      if (w.waiting == 0) run_warp(w, program, left);
    }
    int barrier = -1;
    for (Warp& w : block.warps)
      if (w.waiting != 0) {
        if (barrier >= 0 && barrier != w.barrier) fail("warps wait at different barriers");
        barrier = w.barrier;
      }
    if (barrier < 0) return;
    block.released = block.launch->time;
    for (const auto& entry : block.acquired)
      add_view(block.view, entry.second);
    block.acquired.clear();
    for (Warp& w : block.warps)
      if (w.waiting != 0) {
        add_path(w, w.resume, w.waiting);
        w.waiting = 0;
      }
  }
}

void set_specials(Warp& w, const Program& program, const Launch& launch) {
  const Block& block = *w.block;
  for (int lane = 0; lane < LANES; ++lane) {
    const uint32_t thread = static_cast<uint32_t>(w.number * LANES + lane);
    const uint32_t values[13] = {
        thread,
        0,
        0,
        block.at[0],
        block.at[1],
        block.at[2],
        launch.threads,
        1,
        1,
        launch.grid[0],
        launch.grid[1],
        launch.grid[2],
        static_cast<uint32_t>(lane)
    };
    for (size_t k = 0; k < 13; ++k)
      if (program.specials[k] >= 0) w.reg<uint32_t>(program.specials[k])[lane] = values[k];
  }
}

void run(const Program& program, Launch& launch, uint64_t shared, uint64_t limit) {
  Block block;
  block.launch = &launch;
  const uint32_t warps = launch.threads / LANES;
  const uint32_t blocks = launch.grid[0] * launch.grid[1] * launch.grid[2];
  for (uint32_t k = 0; k < blocks; ++k) {
    block.number = launch.backwards ? blocks - 1 - k : k;
    block.at[0] = block.number % launch.grid[0];
    block.at[1] = block.number / launch.grid[0] % launch.grid[1];
    block.at[2] = block.number / launch.grid[0] / launch.grid[1];
    block.shared.assign(shared, 0xBD);
    block.shadow.cells.assign(shared, {});
    block.shadow.shared = true;
    block.released = 0;
    block.view.clear();
    block.acquired.clear();
    block.warps.resize(warps);
    for (uint32_t n = 0; n < warps; ++n) {
      Warp& w = block.warps[n];
      w.block = &block;
      w.number = static_cast<int>(n);
      w.file = program.file;
      w.local.assign(program.local * LANES, 0xBD);
      w.paths.assign(1, {0, ALL});
      w.waiting = 0, w.alive = ALL, w.synced = 0, w.fenced = 0, w.waited = 0;
      w.copies.assign(1, {});
      w.products.assign(1, {});
      set_specials(w, program, launch);
    }
    run_block(block, program, limit);
    for (const Warp& w : block.warps)
      if (w.products.size() > 1 || !w.products.back().empty()) fail("a wgmma that nobody waits for");
  }
}

}  // namespace

void fail(const std::string& what) { throw std::runtime_error(what); }

std::string text_of(const Warp& w, int lane) {
  const Block& b = *w.block;
  return "thread " + std::to_string(w.number * LANES + lane) + " of block (" + std::to_string(b.at[0]) + ", " +
         std::to_string(b.at[1]) + ", " + std::to_string(b.at[2]) + "): ";
}

void fail_lane(const Warp& w, int lane, const std::string& what) { fail(text_of(w, lane) + what); }

}  // namespace ptx

extern "C" {

int ptx_entries() { return static_cast<int>(ptx::entries().size()); }
const char* ptx_name(int k) { return ptx::entries()[static_cast<size_t>(k)]->first.c_str(); }
const char* ptx_signature(int k) { return ptx::entries()[static_cast<size_t>(k)]->second.signature.c_str(); }

// code: for each instruction its entry, guard (offset or -1), whether that is negated, count of operands, operands.
void* ptx_program(
    const int64_t* code, int64_t length, const uint8_t* file, int64_t file_size, const int64_t* specials, uint64_t local
) {
  auto* program = new ptx::Program;
  program->operands.assign(code, code + length);
  program->file.assign(file, file + file_size);
  program->specials.assign(specials, specials + 13);
  program->local = local;
  const int64_t* at = program->operands.data();
  const int64_t* end = at + length;
  while (at < end) {
    const ptx::Entry& entry = ptx::entries()[static_cast<size_t>(at[0])]->second;
    ptx::Instruction i;
    i.run = entry.run;
    i.kind = entry.kind;
    i.guard = at[1];
    i.negated = at[2] != 0;
    i.count = static_cast<int>(at[3]);
    i.o = at + 4;
    program->instructions.push_back(i);
    at += 4 + i.count;
  }
  return program;
}

void ptx_free_program(void* program) { delete static_cast<ptx::Program*>(program); }

// An array of a launch: where the kernel sees it, what it is, and the region of the launch whose memory it shares
// (itself, or an earlier one), at which byte.
struct PtxRegion {
  uint64_t base, size;
  uint8_t* data;
  const uint8_t* allowed;
  int64_t storage;  // number of the shadow
  uint64_t offset;  // into it
  const char* name;
};

// Runs a launch; the number of instructions run by warps, and races in global memory as the message, a line each; or
// -1 - the instruction that failed, with a message. flags: 1 backwards, 2 overlaps,
// 4 real addresses.
int64_t ptx_run(
    const void* program, const PtxRegion* regions, int count, const uint64_t* shadow_sizes, int shadows,
    const uint8_t* parameters, int64_t parameter_size, const uint32_t* grid, uint32_t threads, uint64_t shared,
    uint64_t limit, int flags, char* message, int64_t message_size
) {
  ptx::Launch launch;
  std::vector<ptx::Shadow> watch(static_cast<size_t>(shadows));
  for (int k = 0; k < shadows; ++k)
    watch[static_cast<size_t>(k)].cells.resize(shadow_sizes[k]);
  for (int k = 0; k < count; ++k) {
    const PtxRegion& r = regions[k];
    launch.regions.push_back(
        {r.base, r.size, r.data, r.allowed, &watch[static_cast<size_t>(r.storage)], r.offset, r.name}
    );
  }
  launch.parameters.assign(parameters, parameters + parameter_size);
  std::copy(grid, grid + 3, launch.grid);
  launch.threads = threads;
  launch.backwards = (flags & 1) != 0;
  launch.overlaps = (flags & 2) != 0;
  launch.real_addresses = (flags & 4) != 0;
  try {
    ptx::run(*static_cast<const ptx::Program*>(program), launch, shared, limit);
  } catch (const std::exception& error) {
    std::strncpy(message, error.what(), static_cast<size_t>(message_size) - 1);
    return -1 - ptx::current;
  }
  std::string hazards;
  for (const std::string& hazard : launch.hazards)
    hazards += hazard + "\n";
  std::strncpy(message, hazards.c_str(), static_cast<size_t>(message_size) - 1);
  return launch.time;
}
}
