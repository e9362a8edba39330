// An allocator for the CPU that keeps large freed blocks for the next tensor that fits.
//
// The C library hands every large block back to the system, which zeroes it page by page when the next tensor touches
// it: a third of the time of a training step. Here a freed block waits in a list. A model allocates the same sizes
// again and again, so most blocks come from it. What waits is handed back before the process would grow past what its
// tensors needed at once at the worst moment so far, and a quarter (at most 768 MiB).

#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <torch/library.h>

#include <pthread.h>
#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <mutex>
#include <unordered_map>
#include <vector>

namespace {

constexpr size_t kMinBytes = 1 << 20;  // what is smaller is the C library's
constexpr size_t kPage = 1 << 16;  // a multiple of every system's
constexpr size_t kSlackShare = 2;  // a block may be larger than the request by 1/2
constexpr size_t kBoundShare = 4;  // all blocks together may exceed the worst moment by 1/4,
constexpr size_t kBoundBytes = 3 << 28;  // but by no more than this

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

  // [bytes that wait, bytes in use, bytes in use at the worst moment]
  std::vector<int64_t> statistics() {
    std::lock_guard<std::mutex> guard(mutex_);
    return {(int64_t)waiting_bytes_, (int64_t)used_bytes_, (int64_t)peak_bytes_};
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
  void* take(size_t bytes) {
    bytes = (bytes + kPage - 1) / kPage * kPage;
    std::lock_guard<std::mutex> guard(mutex_);
    auto found = waiting_.lower_bound(bytes);
    void* data = nullptr;
    if (found != waiting_.end() && found->first <= bytes + bytes / kSlackShare) {
      bytes = found->first;
      data = found->second;
      waiting_bytes_ -= bytes;
      waiting_.erase(found);
    } else {
      // The largest go first: the fewest calls, and the least likely to fit.
      const size_t bound = std::max(peak_bytes_ + std::min(peak_bytes_ / kBoundShare, kBoundBytes), used_bytes_ + bytes);
      while (!waiting_.empty() && used_bytes_ + bytes + waiting_bytes_ > bound) {
        release(std::prev(waiting_.end()));
      }
      data = map(bytes);
      while (data == nullptr && !waiting_.empty()) {  // a limit of the system's
        release(std::prev(waiting_.end()));
        data = map(bytes);
      }
      TORCH_CHECK(data != nullptr, "not enough memory: you tried to allocate ", bytes, " bytes.");
    }
    used_[data] = bytes;
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
    self.waiting_bytes_ += found->second;
    self.waiting_.emplace(found->second, data);
    self.used_.erase(found);
  }

  void release(std::multimap<size_t, void*>::iterator block) {
    munmap(block->second, block->first);
    waiting_bytes_ -= block->first;
    waiting_.erase(block);
  }

  static void* map(size_t bytes) {
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    return data == MAP_FAILED ? nullptr : data;
  }

  c10::Allocator* small_ = c10::GetDefaultCPUAllocator();
  std::mutex mutex_;
  std::multimap<size_t, void*> waiting_;
  std::unordered_map<void*, size_t> used_;
  size_t waiting_bytes_ = 0, used_bytes_ = 0, peak_bytes_ = 0;
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
