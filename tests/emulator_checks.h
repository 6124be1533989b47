// What the emulator's tests share.
#pragma once
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "check.h"

namespace gptoss::cuda {

// The order of threads and blocks from the next launch on.
inline void set_seed(int seed) { setenv("GPTOSS_EMULATOR_SEED", std::to_string(seed).c_str(), 1); }

// `run` throws a runtime_error that says `what`.
template <class Run>
void expect_error(const char* what, const Run& run) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    CHECK(std::string(error.what()).find(what) != std::string::npos, "another error: ", error.what());
    return;
  }
  CHECK(false, "no error: ", what);
}

}  // namespace gptoss::cuda
