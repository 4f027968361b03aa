#include "base/table_memory.h"

#include <atomic>
#include <cstring>

#include "base/pages.h"

#if defined(__linux__)
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "base/lines.h"
#endif

namespace lucid {
namespace {

struct Name {
  const char* name;
  TableMemory memory;
};
constexpr Name kNames[] = {{"auto", TableMemory::kAuto},
                           {"inplace", TableMemory::kInplace},
                           {"hugepage_copy", TableMemory::kHugepageCopy},
                           {"mmap", TableMemory::kMmap}};

std::atomic<int64_t> g_living{0}, g_living_bytes{0}, g_made{0};

}  // namespace

Status ParseTableMemory(const char* text, TableMemory* memory) {
  for (const Name& name : kNames) {
    if (std::strcmp(text, name.name) == 0) {
      *memory = name.memory;
      return Status();
    }
  }
  return InvalidArgument(
      "lucid.table_memory = '%.100s' is not one of auto, inplace, hugepage_copy, mmap", text);
}

TablePlan PlanTable(TableMemory memory, TableSource source, size_t bytes, int64_t free,
                    bool huge_pages) {
#if !defined(__linux__)
  return TablePlan::kStay;
#endif
  if (bytes < kLargeTable || memory == TableMemory::kMmap) return TablePlan::kStay;
  if (source == TableSource::kAnonymous) return TablePlan::kInPlace;
  const uint64_t room = static_cast<uint64_t>(free < 0 ? 0 : free);
  const uint64_t needed = (uint64_t{bytes} + kHugePage - 1) / kHugePage * kHugePage;
  if (memory == TableMemory::kHugepageCopy) {
    // Where the system does not say, the copy itself finds out.
    return free < 0 || needed <= room ? TablePlan::kCopy : TablePlan::kNoMemory;
  }
  if (memory == TableMemory::kAuto && source == TableSource::kPrivateFile && huge_pages &&
      needed <= room - room / 4) {
    return TablePlan::kCopy;
  }
  return TablePlan::kStay;
}

JoinPlan PlanJoin(TableMemory memory, size_t bytes, int64_t free, bool huge_pages) {
#if !defined(__linux__)
  return JoinPlan::kNone;
#endif
  if (bytes == 0 || memory == TableMemory::kInplace || memory == TableMemory::kMmap) {
    return JoinPlan::kNone;
  }
  if (bytes < kLargeTable) return JoinPlan::kCopy;
  const TablePlan plan =
      PlanTable(TableMemory::kAuto, TableSource::kPrivateFile, bytes, free, huge_pages);
  return plan == TablePlan::kCopy ? JoinPlan::kHugePageCopy : JoinPlan::kNone;
}

TableCopies CountTableCopies() { return {g_living, g_living_bytes, g_made}; }

#if defined(__linux__)
namespace {

// ---- Where the bytes of a table come from.

struct Origin {
  TableSource source = TableSource::kOther;
  bool as_file = false;  // a mapping that nothing was written to
  uint64_t device = 0, inode = 0, offset = 0;
  std::string path;
};

// Whether no page of the mapping at this address is one of the process's own, as a write makes
// them: the runtime maps files writable. After /proc/self/smaps: a line as in maps, then "Name:
// size kB".
bool HasNoOwnPages(uint64_t address) {
  Lines smaps("/proc/self/smaps");
  std::string line;
  bool here = false;
  int none = 0;
  while (smaps.Next(&line)) {
    uint64_t low, high, size;
    char name[32];
    if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " ", &low, &high) == 2) {
      if (here) break;
      here = low <= address && address < high;
    } else if (here && std::sscanf(line.c_str(), "%31[^:]: %" SCNu64, name, &size) == 2 &&
               (std::strcmp(name, "Anonymous") == 0 || std::strcmp(name, "Swap") == 0)) {
      if (size > 0) return false;
      ++none;
    }
  }
  return none >= 1;  // a system without swap need not tell of it
}

// After /proc/self/maps: "low-high permissions offset major:minor inode   path", the path with
// newlines as \012.
Origin FindOrigin(const void* data, size_t bytes) {
  const uint64_t begin = reinterpret_cast<uintptr_t>(data), end = begin + bytes;
  Origin origin;
  uint64_t covered = begin;
  Lines maps("/proc/self/maps");
  std::string line;
  while (covered < end && maps.Next(&line)) {
    uint64_t low, high, offset, inode;
    unsigned major, minor;
    char permissions[5];
    int path = 0;
    if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64 " %n",
                    &low, &high, permissions, &offset, &major, &minor, &inode, &path) < 7 ||
        covered < low || high <= covered) {
      continue;
    }
    const bool is_private = permissions[3] == 'p', writable = permissions[1] == 'w';
    if (is_private && writable && inode == 0) {
      covered = high;
      if (covered >= end) origin.source = TableSource::kAnonymous;
      continue;
    }
    if (covered == begin && high >= end && inode != 0) {
      origin.source = is_private ? TableSource::kPrivateFile : TableSource::kOther;
      origin.as_file = is_private && (!writable || HasNoOwnPages(begin));
      origin.device = uint64_t{major} << 32 | minor;
      origin.inode = inode;
      origin.offset = offset + (begin - low);
      for (const char* c = line.c_str() + path; *c; ++c) {
        if (std::strncmp(c, "\\012", 4) == 0) {
          origin.path += '\n';
          c += 3;
        } else {
          origin.path += *c;
        }
      }
    }
    break;
  }
  return origin;
}

struct File {
  bool known = false;  // it still has its name
  uint64_t device = 0, size = 0;
  struct timespec modified = {}, changed = {};  // the second one is not for anybody to set

  bool operator==(const File& other) const {
    return known == other.known && device == other.device && size == other.size &&
           modified.tv_sec == other.modified.tv_sec && modified.tv_nsec == other.modified.tv_nsec &&
           changed.tv_sec == other.changed.tv_sec && changed.tv_nsec == other.changed.tv_nsec;
  }
};

// Of the file that stands behind the mapping. By the inode alone: some file systems show another
// device in maps than in stat.
File Describe(const Origin& origin, const struct stat& s) {
  File file;
  if (uint64_t{s.st_ino} != origin.inode || !S_ISREG(s.st_mode)) return file;
  file.known = true;
  file.device = s.st_dev;
  file.size = static_cast<uint64_t>(s.st_size);
  file.modified = s.st_mtim;
  file.changed = s.st_ctim;
  return file;
}

File FindFile(const Origin& origin) {
  struct stat s;
  if (origin.path.empty() || origin.path[0] != '/' || stat(origin.path.c_str(), &s) != 0) return {};
  return Describe(origin, s);
}

// The clocks of file systems tick every few milliseconds (2 s on the coarsest), so that a file that
// was changed just now could change again and show the same time.
bool ChangedJustNow(const File& file) {
  struct timespec now;
  clock_gettime(CLOCK_REALTIME, &now);
  return std::max(file.modified.tv_sec, file.changed.tv_sec) + 3 > now.tv_sec;
}

using Key = std::array<uint64_t, 12>;

Key MakeKey(const Origin& origin, const File& file, const void* data, size_t bytes) {
  return {origin.device,
          origin.inode,
          origin.offset,
          uint64_t{bytes},
          uint64_t{file.known},
          file.device,
          file.size,
          static_cast<uint64_t>(file.modified.tv_sec),
          static_cast<uint64_t>(file.modified.tv_nsec),
          static_cast<uint64_t>(file.changed.tv_sec),
          static_cast<uint64_t>(file.changed.tv_nsec),
          file.known ? 0 : uint64_t{reinterpret_cast<uintptr_t>(data)}};
}

// ---- Copies.

// Anonymous memory of whole huge pages.
class Copy {
 public:
  // Whether there is an address range for it.
  bool Reserve(size_t bytes) {
    bytes_ = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* const found = mmap(nullptr, bytes_ + kHugePage, PROT_READ | PROT_WRITE,
                             MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (found == MAP_FAILED) return false;
    char* const raw = static_cast<char*>(found);
    const size_t lead = (kHugePage - reinterpret_cast<uintptr_t>(raw) % kHugePage) % kHugePage;
    if (lead > 0) munmap(raw, lead);
    munmap(raw + lead + bytes_, kHugePage - lead);
    data_ = raw + lead;
    // Without huge pages, or where it is denied, the copy is one of small pages.
    static_cast<void>(madvise(data_, bytes_, MADV_HUGEPAGE));
    return true;
  }

  // It is filled: pages that were not huge become so where they can, and nothing writes to it
  // again.
  void Finish(bool certain) {
    BackWithHugePages(data_, bytes_);
    static_cast<void>(mprotect(data_, bytes_, PROT_READ));
    certain_ = certain;
    counted_ = true;
    ++g_living;
    ++g_made;
    g_living_bytes += static_cast<int64_t>(bytes_);
  }

  Copy() = default;
  Copy(const Copy&) = delete;
  Copy& operator=(const Copy&) = delete;
  ~Copy() {
    if (data_) munmap(data_, bytes_);
    if (!counted_) return;
    --g_living;
    g_living_bytes -= static_cast<int64_t>(bytes_);
  }

  char* data() const { return data_; }
  bool certain() const { return certain_; }  // its key alone says what is in it

 private:
  char* data_ = nullptr;
  size_t bytes_ = 0;
  bool certain_ = false, counted_ = false;
};

struct Registry {
  Registry();

  // Held for as long as a copy takes: one at a time counts the free memory. A child that is forked
  // meanwhile has nobody who would give it back, and gets another one.
  std::mutex* making = new std::mutex;
  std::mutex copies_mutex;
  std::map<Key, std::weak_ptr<Copy>> copies;
};

// Made when the library is loaded, and never destroyed: sessions may outlive the statics of a
// process.
Registry& g_registry = *new Registry;
Registry& TheRegistry() { return g_registry; }

Registry::Registry() {
  // Of what is held for a moment only, a fork waits for the end of the moment. That it cannot be
  // arranged, for want of memory, is no reason not to work.
  static_cast<void>(pthread_atfork([] { TheRegistry().copies_mutex.lock(); },
                                   [] { TheRegistry().copies_mutex.unlock(); },
                                   [] {
                                     TheRegistry().copies_mutex.unlock();
                                     TheRegistry().making = new std::mutex;
                                   }));
}

std::shared_ptr<Copy> FindCopy(const Key& key) {
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.copies_mutex);
  const auto found = registry.copies.find(key);
  return found == registry.copies.end() ? nullptr : found->second.lock();
}

void Forget(const Key& key) {
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.copies_mutex);
  const auto found = registry.copies.find(key);
  // Another one may stand there already.
  if (found != registry.copies.end() && found->second.expired()) registry.copies.erase(found);
}

constexpr size_t kPiece = size_t{32} << 20;

// A mapping's pages count as this process's memory once they were read. Those of a file that nobody
// can have written to come back from the page cache when somebody needs them.
void Release(const Origin& origin, const char* begin, size_t bytes) {
  if (origin.source != TableSource::kPrivateFile || !origin.as_file) return;
  const uintptr_t page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t low = (reinterpret_cast<uintptr_t>(begin) + page - 1) / page * page;
  const uintptr_t high = (reinterpret_cast<uintptr_t>(begin) + bytes) / page * page;
  if (low < high) madvise(reinterpret_cast<void*>(low), high - low, MADV_DONTNEED);
}

bool Same(const Origin& origin, const char* table, const char* copy, size_t bytes) {
  for (size_t done = 0; done < bytes; done += kPiece) {
    const size_t size = std::min(kPiece, bytes - done);
    const bool same = std::memcmp(table + done, copy + done, size) == 0;
    Release(origin, table + done, size);
    if (!same) return false;
  }
  return true;
}

class Descriptor {
 public:
  explicit Descriptor(int fd) : fd_(fd) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (fd_ >= 0) close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

// Told at most every so often.
class Teller {
 public:
  Teller(const CopyProgress& progress, size_t total)
      : progress_(progress), total_(total), next_(Clock::now() + std::chrono::seconds(2)) {}
  void Tell(size_t done) {
    if (!progress_.tell || Clock::now() < next_) return;
    progress_.tell(progress_.host, done, total_);
    next_ = Clock::now() + std::chrono::seconds(5);
  }

 private:
  using Clock = std::chrono::steady_clock;
  const CopyProgress& progress_;
  const size_t total_;
  Clock::time_point next_;
};

// From the file, which maps no page of it into this process and finds a file that was cut off; from
// the mapping where that may hold something else, or the file cannot be opened.
Status Fill(const Origin& origin, const File& file, const char* table, size_t bytes,
            const CopyProgress& progress, char* to) {
  Teller teller(progress, bytes);
  const bool by_name = file.known && origin.as_file;
  const Descriptor fd(by_name ? open(origin.path.c_str(), O_RDONLY | O_CLOEXEC) : -1);
  struct stat s;
  if (fd.get() < 0 || fstat(fd.get(), &s) != 0 || !(Describe(origin, s) == file)) {
    for (size_t done = 0; done < bytes; done += kPiece) {
      const size_t size = std::min(kPiece, bytes - done);
      std::memcpy(to + done, table + done, size);
      Release(origin, table + done, size);
      teller.Tell(done + size);
    }
    return Status();
  }
  static_cast<void>(posix_fadvise(fd.get(), static_cast<off_t>(origin.offset),
                                  static_cast<off_t>(bytes), POSIX_FADV_SEQUENTIAL));
  for (size_t done = 0; done < bytes;) {
    const ssize_t got = pread(fd.get(), to + done, std::min(kPiece, bytes - done),
                              static_cast<off_t>(origin.offset + done));
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) {
      return Error(Code::kInternal,
                   "lucid.table_memory: byte %llu of %zu of a table could not be read from "
                   "'%.100s': %s",
                   static_cast<unsigned long long>(done), bytes, origin.path.c_str(),
                   got < 0 ? std::strerror(errno) : "the file was cut off");
    }
    done += static_cast<size_t>(got);
    teller.Tell(done);
  }
  if (fstat(fd.get(), &s) != 0 || !(Describe(origin, s) == file)) {
    return Error(Code::kInternal,
                 "lucid.table_memory: '%.100s' was changed while %zu bytes of it were copied",
                 origin.path.c_str(), bytes);
  }
  return Status();
}

// A new copy, or null where kAuto does without.
Status MakeCopy(TableMemory memory, const Origin& origin, const File& file, const Key& key,
                const char* table, size_t bytes, const CopyProgress& progress,
                std::shared_ptr<Copy>* out) {
  const bool needed = memory == TableMemory::kHugepageCopy;
  const int64_t free = FreeMemory();
  const TablePlan plan = PlanTable(memory, origin.source, bytes, free, HugePagesOffered());
  if (plan == TablePlan::kStay) return Status();
  if (plan == TablePlan::kNoMemory) {
    return Error(Code::kOutOfMemory,
                 "lucid.table_memory = hugepage_copy needs %zu bytes for the copy of a table, %lld "
                 "are free",
                 bytes, static_cast<long long>(free));
  }
  const bool certain = file.known && origin.as_file && !ChangedJustNow(file);
  auto copy = std::unique_ptr<Copy>(new Copy);
  if (!copy->Reserve(bytes)) {
    if (!needed) return Status();
    return Error(Code::kOutOfMemory,
                 "lucid.table_memory = hugepage_copy needs %zu bytes for the copy of a table: %s",
                 bytes, std::strerror(errno));
  }
  const Status status = Fill(origin, file, table, bytes, progress, copy->data());
  if (!status.ok()) return needed ? status : Status();
  copy->Finish(certain);
  *out = std::shared_ptr<Copy>(copy.release(), [key](Copy* last) {
    delete last;
    Forget(key);
  });
  Registry& registry = TheRegistry();
  const std::lock_guard<std::mutex> lock(registry.copies_mutex);
  registry.copies[key] = *out;
  return Status();
}

}  // namespace

Status PlaceTable(TableMemory memory, size_t bytes, const CopyProgress& progress,
                  const void** table, std::shared_ptr<const void>* keep) {
  if (bytes < kLargeTable || memory == TableMemory::kMmap) return Status();
  const Origin origin = FindOrigin(*table, bytes);
  if (origin.source == TableSource::kAnonymous) {
    BackWithHugePages(*table, bytes);
    return Status();
  }
  if (memory == TableMemory::kInplace ||
      (memory == TableMemory::kAuto && origin.source == TableSource::kOther)) {
    return Status();
  }
  const char* const data = static_cast<const char*>(*table);
  const File file = FindFile(origin);
  const Key key = MakeKey(origin, file, data, bytes);
  const std::lock_guard<std::mutex> lock(*TheRegistry().making);
  std::shared_ptr<Copy> copy = FindCopy(key);
  const bool certain = copy && copy->certain() && origin.as_file;
  if (copy && !certain && !Same(origin, data, copy->data(), bytes)) copy = nullptr;
  if (!copy) {
    const Status status = MakeCopy(memory, origin, file, key, data, bytes, progress, &copy);
    if (!status.ok()) return status;
    if (!copy) return Status();
  }
  *table = copy->data();
  *keep = std::move(copy);
  return Status();
}

JoinedRows JoinRows(TableMemory memory, const RowPart* parts, size_t num_parts, size_t rows,
                    const CopyProgress& progress) {
  JoinedRows joined;
  for (size_t i = 0; i < num_parts; ++i) joined.stride += parts[i].bytes;
  const size_t bytes = joined.stride * rows;  // no more than the arrays take, so it fits
  const bool large = bytes >= kLargeTable;
  const JoinPlan plan =
      PlanJoin(memory, bytes, large ? FreeMemory() : 0, large && HugePagesOffered());
  char* to;
  std::shared_ptr<Copy> copy;
  if (plan == JoinPlan::kCopy) {
    to = new (std::nothrow) char[bytes];
    if (!to) return joined;
    joined.memory = std::shared_ptr<const char>(to, std::default_delete<const char[]>());
  } else if (plan == JoinPlan::kHugePageCopy) {
    copy = std::make_shared<Copy>();
    if (!copy->Reserve(bytes)) return joined;
    to = copy->data();
    joined.memory = std::shared_ptr<const void>(copy, to);
  } else {
    return joined;
  }
  joined.data = to;
  Teller teller(progress, bytes);
  constexpr size_t kRowsAtOnce = 1 << 16;
  for (size_t row = 0; row < rows; ++row) {
    for (size_t i = 0; i < num_parts; ++i) {
      std::memcpy(to, parts[i].data + row * parts[i].bytes, parts[i].bytes);
      to += parts[i].bytes;
    }
    if (row % kRowsAtOnce == 0) teller.Tell(row * joined.stride);
  }
  if (copy) copy->Finish(false);
  return joined;
}

#else

// Nothing is known of memory elsewhere, so that no table is moved.
Status PlaceTable(TableMemory memory, size_t bytes, const CopyProgress&, const void**,
                  std::shared_ptr<const void>*) {
  if (bytes < kLargeTable || memory != TableMemory::kHugepageCopy) return Status();
  return InvalidArgument("lucid.table_memory = hugepage_copy needs Linux");
}

JoinedRows JoinRows(TableMemory, const RowPart*, size_t, size_t, const CopyProgress&) {
  return JoinedRows();
}

#endif

}  // namespace lucid
