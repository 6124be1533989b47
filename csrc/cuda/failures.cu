// See failures.h. What is known of each card is one table of this process.
#include "cuda/failures.h"

#include <map>
#include <mutex>
#include <string>

#include "cuda/common.cuh"

namespace gptoss::cuda {
namespace {

struct Card {
  int users = 0;
  std::string failure;  // the first since it was reset; empty: none
};

std::mutex mutex;
std::map<int, Card> cards;

// What the current card says to a call that does nothing. A mistake while capturing is no failure of the card.
cudaError_t ask_card() {
  cudaGetLastError();  // what was returned before and does not stay
  size_t free = 0, total = 0;
  const cudaError_t status = cudaMemGetInfo(&free, &total);
  cudaGetLastError();
  return status >= 900 && status <= 908 ? cudaSuccess : status;  // cudaErrorStreamCapture...
}

}  // namespace

void call_failed(const char* call, cudaError_t status) {
  const std::string message = join("CUDA: ", call, " failed: ", cudaGetErrorString(status));
  if (int device = 0; cudaGetDevice(&device) == cudaSuccess && ask_card() != cudaSuccess) {
    std::lock_guard lock(mutex);
    std::string& failure = cards[device].failure;
    if (failure.empty()) failure = message;
  }
  throw std::runtime_error(message);
}

void CardUse::revive(int device) {
  std::lock_guard lock(mutex);
  Card& card = cards[device];
  if (card.failure.empty()) return;
  if (card.users > 0)
    FAIL("cuda:", device, " has failed, and can be used again when all models on it are closed: ", card.failure);
  cudaSetDevice(device);
  cudaDeviceReset();
  cudaSetDevice(device);
  if (const cudaError_t status = ask_card(); status != cudaSuccess)
    FAIL("cuda:", device, " has failed and could not be reset (", cudaGetErrorString(status), "): ", card.failure);
  card.failure.clear();
}

CardUse::CardUse(int device) : device_(device) {
  CUDA_CHECK(cudaSetDevice(device));
  std::lock_guard lock(mutex);
  ++cards[device].users;
}

CardUse::~CardUse() {
  std::lock_guard lock(mutex);
  --cards[device_].users;
}

void CardUse::check() const {
  std::lock_guard lock(mutex);
  if (const std::string& failure = cards[device_].failure; !failure.empty())
    FAIL("this model cannot be used any more, its card has failed: ", failure);
}

}  // namespace gptoss::cuda
