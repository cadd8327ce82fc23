// A team: torch's threads, running one function side by side through many small steps.
//
// A parallel_for costs about 3 us at each end; a step of decoding is sixty products of 20 to 400 us each. A team is one
// parallel_for for all of them: its members run the same code, share the work of each step as parallel.h hands it out,
// and meet at a barrier where a parallel_for would have ended. Who waits there fetches the weights of the next
// step, so that memory does not rest either.
#pragma once

#include <atomic>
#include <cstdint>

namespace alula {

// Bytes to bring into the caches.
struct Fetch {
  const char* begin = nullptr;
  int64_t bytes = 0;
};

class Team {
 public:
  explicit Team(int64_t size) : size_(size) {}
  Team(const Team&) = delete;
  Team& operator=(const Team&) = delete;

  int64_t size() const { return size_; }

  // How the team works: not decided yet, all together, or one member alone, where threads do not run at once.
  enum class Way : int { kOpen, kTogether, kAlone };

  // The first meeting. kTogether once all came. kAlone for one member if they do not come: it does the work of all;
  // kOpen for those who come after that and have nothing to do.
  Way meet_first();
  // Decides for kAlone at once; kOpen if it is decided already.
  Way stay_alone();
  // Waits for all members; what they wrote before is seen after. Takes from `fetch` what it could fetch.
  void meet(Fetch& fetch);

 private:
  const int64_t size_;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<uint32_t> round_{0};
  alignas(64) std::atomic<Way> way_{Way::kOpen};
};

// The calling thread's place in a team.
struct TeamMember {
  Team* team;  // null: alone, in the place of all
  int64_t rank;
  Fetch fetch;  // what to bring into the caches at the next barrier

  int64_t size() const { return team ? team->size() : 1; }
  void meet() {
    if (team) team->meet(fetch);
  }
};

// The member that the calling thread is, or null outside of teams.
TeamMember*& current_member();

}  // namespace alula
