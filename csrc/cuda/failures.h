// Cards that fail. A kernel that goes wrong (an illegal address, a failed launch) spoils what this process has on its card:
// every later call there returns the error, until the card is reset, which nothing that is on it survives.
#pragma once

namespace gptoss::cuda {

// A backend's use of a card; the first thing it takes and the last it gives back.
class CardUse {
 public:
  explicit CardUse(int device);  // makes it the current one
  ~CardUse();
  // Resets a card that has failed; throws if a backend is still on it.
  static void revive(int device);
  CardUse(const CardUse&) = delete;
  CardUse& operator=(const CardUse&) = delete;

  // Throws, naming the call that failed first, if the card has failed since.
  void check() const;

 private:
  int device_;
};

}  // namespace gptoss::cuda
