#include "reader.h"

#include "formats.h"
#include "pool.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace octavo {
namespace {

constexpr int64_t kPage = 4096;
// A segment is so many reads, all of them on their way at once where there are as many threads: a thread that has a next
// one to begin first waits for a core, while products are computed.
constexpr int64_t kParts = 4, kLeastPart = 1 << 20, kMostPart = 32 << 20;
constexpr int64_t kTouched = 2 << 20;  // bytes of a task

// Counts the time in which at least one thread waits.
class Waiting {
  public:
    void begin() {
        const std::lock_guard lock(mutex_);
        if (count_++ == 0) since_ = Clock::now();
    }
    void end() {
        const std::lock_guard lock(mutex_);
        if (--count_ == 0) seconds_ += std::chrono::duration<double>(Clock::now() - since_).count();
    }
    double seconds() {
        const std::lock_guard lock(mutex_);
        return seconds_;
    }

  private:
    using Clock = std::chrono::steady_clock;
    std::mutex mutex_;
    int count_ = 0;
    Clock::time_point since_;
    double seconds_ = 0;
};

Waiting waiting;

void wait_for(const std::atomic<int>& there) {
    if (there.load(std::memory_order_acquire)) return;
    waiting.begin();
    while (!there.load(std::memory_order_acquire)) there.wait(0, std::memory_order_acquire);
    waiting.end();
}

}  // namespace

void touch(uint8_t* begin, int64_t nbytes) {
    parallel(ceil_div(nbytes, kTouched), [&](int64_t task, int) {
        const int64_t end = std::min(nbytes, (task + 1) * kTouched);
        for (int64_t at = task * kTouched; at < end; at += kPage) *static_cast<volatile uint8_t*>(begin + at) = 0;
    });
}

bool populate(uint8_t* begin, int64_t nbytes) {
#if defined(__linux__)
    constexpr int kPopulateWrite = 23;  // MADV_POPULATE_WRITE, which older headers lack
    return madvise(begin, size_t(nbytes), kPopulateWrite) == 0;
#else
    (void)begin, (void)nbytes;
    return false;
#endif
}

double waited() { return waiting.seconds(); }

Read::Read(const std::vector<Segment>& segments) {
    for (const Segment& whole : segments) {
        const int64_t size = std::clamp(ceil_div(whole.nbytes, kParts * kPage) * kPage, kLeastPart, kMostPart);
        for (int64_t at = 0; at < whole.nbytes; at += size) {
            Segment part = whole;
            part.begin += at;
            part.to += at;
            part.nbytes = std::min(size, whole.nbytes - at);
            part.needed = std::clamp<int64_t>(whole.needed - at, 0, part.nbytes);
            parts_.push_back(part);
        }
    }
    there_ = std::make_unique<std::atomic<int>[]>(parts_.size());
    left_ = int(parts_.size());
}

void Read::wait() const {
    for (size_t i = 0; i < parts_.size(); ++i) wait_for(there_[i]);
}

void Read::wait(const uint8_t* begin, const uint8_t* end) const {
    if (done()) return;
    for (size_t i = 0; i < parts_.size(); ++i) {
        if (parts_[i].to < end && begin < parts_[i].to + parts_[i].nbytes) wait_for(there_[i]);
    }
}

void Read::run(size_t number) {
    const Segment& part = parts_[number];
    int64_t got = 0;
    while (got < part.needed && !error()) {
        const ssize_t n = pread(part.fd, part.to + got, size_t(part.nbytes - got), part.begin + got);
        if (n < 0 && errno == EINTR) continue;
        if (n < 0) fail(part, errno, part.begin + got);
        if (n <= 0) break;
        got += n;
        if (part.direct && got % kPage) break;  // off a page, a direct read ends with the file
    }
    if (got < part.needed && !error()) fail(part, kShort, part.begin + got);
#if defined(POSIX_FADV_DONTNEED)
    if (!part.direct) posix_fadvise(part.fd, part.begin, part.nbytes, POSIX_FADV_DONTNEED);
#endif
    finish(number);
}

void Read::fail(const Segment& part, int error, int64_t at) {
    const std::lock_guard lock(failing_);
    if (error_) return;
    failed_fd_ = part.fd;
    failed_at_ = at;
    error_.store(error, std::memory_order_release);
}

void Read::finish(size_t part) {
    left_.fetch_sub(1, std::memory_order_release);
    there_[part].store(1, std::memory_order_release);
    there_[part].notify_all();
}

Reader::Reader(int threads) {
    for (int i = 0; i < threads; ++i) threads_.emplace_back([this] { work(); });
}

Reader::~Reader() {
    std::deque<Part> dropped;
    {
        const std::lock_guard lock(mutex_);
        stop_ = true;
        for (auto* queue : {&now_, &later_}) {
            for (Part& part : *queue) dropped.push_back(std::move(part));
            queue->clear();
        }
    }
    any_.notify_all();
    for (auto& [read, number] : dropped) {
        read->fail(read->parts_[number], Read::kCancelled, 0);
        read->finish(number);
    }
    for (auto& thread : threads_) thread.join();
}

void Reader::start(std::shared_ptr<Read> read, bool later) {
    {
        const std::lock_guard lock(mutex_);
        for (size_t i = 0; i < read->parts_.size(); ++i) (later ? later_ : now_).emplace_back(read, i);
    }
    any_.notify_all();
}

void Reader::hurry(const std::shared_ptr<Read>& read) {
    const std::lock_guard lock(mutex_);
    const auto rest = std::stable_partition(later_.begin(), later_.end(), [&](const Part& p) { return p.first != read; });
    std::move(rest, later_.end(), std::back_inserter(now_));
    later_.erase(rest, later_.end());
}

void Reader::cancel(const std::shared_ptr<Read>& read) {
    std::vector<Part> dropped;
    {
        const std::lock_guard lock(mutex_);
        for (auto* queue : {&now_, &later_}) {
            std::copy_if(queue->begin(), queue->end(), std::back_inserter(dropped),
                         [&](const Part& p) { return p.first == read; });
            std::erase_if(*queue, [&](const Part& p) { return p.first == read; });
        }
    }
    for (auto& [one, number] : dropped) {
        one->fail(one->parts_[number], Read::kCancelled, 0);
        one->finish(number);
    }
    read->wait();
}

void Reader::work() {
    for (;;) {
        Part part;
        {
            std::unique_lock lock(mutex_);
            any_.wait(lock, [this] { return stop_ || !now_.empty() || !later_.empty(); });
            if (stop_) return;
            auto& queue = now_.empty() ? later_ : now_;
            part = std::move(queue.front());
            queue.pop_front();
        }
        part.first->run(part.second);
    }
}

}  // namespace octavo
