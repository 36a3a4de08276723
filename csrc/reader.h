// Bytes of files into memory, on threads of their own, several parts at a time: kernels wait for the parts they need.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace octavo {

// Bytes that lie one behind the other in a file.
struct Segment {
    int fd;
    int64_t begin;     // in the file
    uint8_t* to;
    int64_t nbytes;    // room for them: whole pages, where reads are direct
    int64_t needed;    // so many there must be; the file may end behind them
    bool direct;       // around the page cache; otherwise pages are given back to the system once they are read
};

// What is being read at once. Lives until it is done, whoever lets go of it.
class Read {
  public:
    explicit Read(const std::vector<Segment>& segments);

    bool done() const { return left_.load(std::memory_order_acquire) == 0; }
    void wait() const;
    void wait(const uint8_t* begin, const uint8_t* end) const;  // for the parts of these addresses

    // Once it is done: 0, or the number of the system's error, kShort where the file ended too soon, kCancelled.
    int error() const { return error_.load(std::memory_order_acquire); }
    int failed_fd() const { return failed_fd_; }
    int64_t failed_at() const { return failed_at_; }

    static constexpr int kShort = -1, kCancelled = -2;

  private:
    friend class Reader;
    void run(size_t part);
    void fail(const Segment& part, int error, int64_t at);
    void finish(size_t part);

    std::vector<Segment> parts_;
    std::unique_ptr<std::atomic<int>[]> there_;
    std::atomic<int> left_, error_{0};
    std::mutex failing_;
    int failed_fd_ = -1;
    int64_t failed_at_ = 0;
};

class Reader {
  public:
    explicit Reader(int threads);
    ~Reader();  // what has not begun is cancelled

    void start(std::shared_ptr<Read> read, bool later);  // later: behind all that somebody waits for
    void hurry(const std::shared_ptr<Read>& read);       // somebody does now
    void cancel(const std::shared_ptr<Read>& read);      // what has not begun; returns when nothing is written any more

  private:
    using Part = std::pair<std::shared_ptr<Read>, size_t>;
    void work();

    std::mutex mutex_;
    std::condition_variable any_;
    std::deque<Part> now_, later_;
    bool stop_ = false;
    std::vector<std::thread> threads_;
};

// Takes memory by the kernels' threads, a byte of every page. Left to the threads that read, this would be done in the
// midst of somebody's products, for whose threads there would be too few cores.
void touch(uint8_t* begin, int64_t nbytes);

// The same by the calling thread alone, leaving what is in it; false where the system cannot (before Linux 5.14).
bool populate(uint8_t* begin, int64_t nbytes);

// Seconds in which some thread of a kernel waited for a read.
double waited();

}  // namespace octavo
