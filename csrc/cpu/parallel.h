// parallel_for over a small pool of threads that belongs to the library.
//
// Not OpenMP: its runtime clashes with the one that torch brings, and it hangs in a forked child (a DataLoader worker).
// This pool starts afresh after a fork, and a call made while another thread uses the pool simply runs on its own
// thread.
#pragma once

#include <cstdint>
#include <functional>

// One copy of a hot function per instruction set, chosen at load time, so that a wheel built anywhere runs everywhere.
// Sanitizers cannot run code inside the resolver, hence the switch.
#if defined(__GNUC__) && !defined(__clang__) && defined(__x86_64__) && defined(__linux__) &&                           \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__) && !defined(DDPM_FAST_NO_CLONES)
#define DDPM_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DDPM_FAST_CLONES
#endif

namespace ddpm_fast {

// Calls body(begin, end) on disjoint ranges that cover [0, count), on up to `threads` threads. Ranges depend on count
// and grain alone where a result could depend on them; the ops here give the same bits for any split.
void parallel_for(int64_t count, int threads, const std::function<void(int64_t, int64_t)>& body);

}  // namespace ddpm_fast
