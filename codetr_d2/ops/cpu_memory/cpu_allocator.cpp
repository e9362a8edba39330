// An allocator for the CPU that keeps the memory of large freed tensors for the next ones.
//
// The C library hands every large block back to the system, which zeroes it page by page when the next tensor touches
// it: a third of the time of a training step. Here large tensors are ranges of a few large regions. The memory of a
// freed range is kept, and joined with that of its neighbours; the next tensor gets the smallest kept range that holds
// it, or else fresh memory. Kept memory is handed back before the process would grow past what its tensors needed at
// once at the worst moment so far, and a quarter (at most 384 MiB).

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <map>
#include <mutex>
#include <set>
#include <unordered_map>
#include <utility>
#include <vector>

namespace {

constexpr size_t kMinBytes = 1 << 20;  // what is smaller is the C library's
constexpr size_t kPage = 1 << 16;  // ranges are multiples of it: a multiple of every system's page
constexpr size_t kHugePage = 1 << 21;  // what is fresh, or handed back, is a multiple of it: systems may use such pages
constexpr size_t kRegionBytes = 1 << 30;
constexpr size_t kBoundShare = 4;  // all memory may exceed the worst moment by 1/4,
constexpr size_t kBoundBytes = 3 << 27;  // but by no more than this

size_t round_up(size_t bytes, size_t unit) {
  return (bytes + unit - 1) / unit * unit;
}

char* round_up(char* address, size_t unit) {
  return (char*)round_up((uintptr_t)address, unit);
}

char* round_down(char* address, size_t unit) {
  return (char*)((uintptr_t)address / unit * unit);
}

// Ranges of memory that do not touch each other, to be found by address and by size.
class Ranges {
 public:
  // Add a range, joined with its neighbours.
  void add(char* begin, size_t bytes) {
    if (bytes == 0) {
      return;
    }
    auto next = by_address_.lower_bound(begin);
    if (next != by_address_.end() && begin + bytes == next->first) {
      bytes += next->second;
      next = remove(next);
    }
    if (next != by_address_.begin()) {
      const auto previous = std::prev(next);
      if (previous->first + previous->second == begin) {
        begin = previous->first;
        bytes += previous->second;
        remove(previous);
      }
    }
    by_address_.emplace(begin, bytes);
    by_size_.emplace(bytes, begin);
    total_ += bytes;
  }

  // Take `bytes` from the beginning of the smallest range that has as many; null where none has.
  char* take(size_t bytes) {
    const auto found = by_size_.lower_bound({bytes, nullptr});
    if (found == by_size_.end()) {
      return nullptr;
    }
    const auto [size, begin] = *found;
    remove(by_address_.find(begin));
    add(begin + bytes, size - bytes);
    return begin;
  }

  // Remove and return the largest range, (address, bytes). There must be one.
  std::pair<char*, size_t> take_largest() {
    const auto [size, begin] = *std::prev(by_size_.end());
    remove(by_address_.find(begin));
    return {begin, size};
  }

  size_t total() const {
    return total_;
  }

 private:
  std::map<char*, size_t>::iterator remove(std::map<char*, size_t>::iterator range) {
    total_ -= range->second;
    by_size_.erase({range->second, range->first});
    return by_address_.erase(range);
  }

  std::map<char*, size_t> by_address_;
  std::set<std::pair<size_t, char*>> by_size_;
  size_t total_ = 0;
};

class KeepingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t bytes) override {
    if (bytes < kMinBytes) {
      return small_->allocate(bytes);
    }
    void* data = take(bytes);
    return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &give_back;
  }

  void copy_data(void* dest, const void* src, std::size_t count) const override {
    default_copy_data(dest, src, count);
  }

  // [bytes kept, bytes in use, bytes in use at the worst moment]
  std::vector<int64_t> statistics() {
    std::lock_guard<std::mutex> guard(mutex_);
    return {(int64_t)kept_.total(), (int64_t)used_bytes_, (int64_t)peak_bytes_};
  }

  void lock() {
    mutex_.lock();
  }
  void unlock() {
    mutex_.unlock();
  }

  static KeepingAllocator& instance() {
    static KeepingAllocator* allocator = new KeepingAllocator;  // tensors may outlive everything else
    return *allocator;
  }

 private:
  char* take(size_t bytes) {
    bytes = round_up(bytes, kPage);
    std::lock_guard<std::mutex> guard(mutex_);
    char* data = kept_.take(bytes);
    if (data == nullptr) {
      const size_t fresh_bytes = round_up(bytes, kHugePage);
      data = fresh(fresh_bytes);
      TORCH_CHECK(data != nullptr, "not enough memory: you tried to allocate ", bytes, " bytes.");
      kept_.add(data + bytes, fresh_bytes - bytes);
    }
    used_.emplace(data, bytes);
    used_bytes_ += bytes;
    peak_bytes_ = std::max(peak_bytes_, used_bytes_);
    return data;
  }

  static void give_back(void* data) {
    KeepingAllocator& self = instance();
    std::unique_lock<std::mutex> guard(self.mutex_);
    const auto found = self.used_.find(data);
    if (found == self.used_.end()) {  // a small one, of raw_allocate
      guard.unlock();
      self.small_->raw_deleter()(data);
      return;
    }
    self.used_bytes_ -= found->second;
    self.kept_.add((char*)data, found->second);
    self.used_.erase(found);
  }

  // Memory that the system has to give first, a multiple of huge pages. Null where it gives none.
  char* fresh(size_t bytes) {
    const size_t bound = std::max(peak_bytes_ + std::min(peak_bytes_ / kBoundShare, kBoundBytes), used_bytes_ + bytes);
    while (used_bytes_ + bytes + kept_.total() > bound && hand_back(used_bytes_ + bytes + kept_.total() - bound)) {
    }
    char* data = fresh_.take(bytes);
    if (data == nullptr) {
      const size_t region = std::max(kRegionBytes, bytes);
      void* mapped = mmap(
          nullptr, region + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (mapped == MAP_FAILED) {
        return nullptr;
      }
      char* begin = round_up((char*)mapped, kHugePage);
      fresh_.add(begin, region);
      data = fresh_.take(bytes);
    }
    return data;
  }

  // Hand back `bytes` of kept memory, or what the largest range has of them in huge pages. False where it has none.
  bool hand_back(size_t bytes) {
    if (kept_.total() == 0) {
      return false;
    }
    const auto [begin, size] = kept_.take_largest();
    char* const end = begin + size;
    char* const last = round_down(end, kHugePage);
    char* const whole = round_up(begin, kHugePage);
    if (last <= whole) {
      kept_.add(begin, size);
      return false;
    }
    char* const first = std::max(whole, last - round_up(bytes, kHugePage));
    madvise(first, last - first, MADV_DONTNEED);
    kept_.add(begin, first - begin);
    kept_.add(last, end - last);
    fresh_.add(first, last - first);
    return true;
  }

  c10::Allocator* small_ = c10::GetDefaultCPUAllocator();
  std::mutex mutex_;
  Ranges kept_;  // freed, and still memory of the process
  Ranges fresh_;  // the system gives it at the first touch
  std::unordered_map<void*, size_t> used_;
  size_t used_bytes_ = 0, peak_bytes_ = 0;
};

void keep_freed_memory() {
  static const bool once = [] {
    KeepingAllocator::instance();
    // A child of a fork must not find the lock held by a thread that it does not have.
    pthread_atfork(
        [] { KeepingAllocator::instance().lock(); }, [] { KeepingAllocator::instance().unlock(); },
        [] { KeepingAllocator::instance().unlock(); });
    c10::SetCPUAllocator(&KeepingAllocator::instance(), /*priority=*/1);
    return true;
  }();
  (void)once;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(codetr_d2, m) {
  m.def("_keep_freed_memory() -> ()", keep_freed_memory);
  m.def("_kept_memory() -> int[]", [] { return KeepingAllocator::instance().statistics(); });
}
