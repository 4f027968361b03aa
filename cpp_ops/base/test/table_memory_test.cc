// Where tables go: the choice, the free memory that it counts, and copies of files that are shared,
// changed, cut off and deleted.
#include "base/table_memory.h"

#include <cstdio>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <thread>
#include <vector>

#include "base/pages.h"
#include "base/test/testing.h"

namespace lucid {
namespace {

constexpr size_t kMiB = size_t{1} << 20;
constexpr TableMemory kAuto = TableMemory::kAuto, kInplace = TableMemory::kInplace,
                      kCopying = TableMemory::kHugepageCopy, kMmap = TableMemory::kMmap;

std::string g_folder;

void Write(const std::string& path, const std::string& text) {
  for (size_t at = g_folder.size(); (at = path.find('/', at + 1)) != std::string::npos;) {
    mkdir(path.substr(0, at).c_str(), 0700);
  }
  std::ofstream file(path, std::ios::binary | std::ios::trunc);
  file << text;
  CHECK(file.good());
}

void TestParse() {
  TableMemory memory;
  CHECK(ParseTableMemory("auto", &memory).ok() && memory == kAuto);
  CHECK(ParseTableMemory("inplace", &memory).ok() && memory == kInplace);
  CHECK(ParseTableMemory("hugepage_copy", &memory).ok() && memory == kCopying);
  CHECK(ParseTableMemory("mmap", &memory).ok() && memory == kMmap);
  for (const char* wrong : {"", "Auto", "auto ", "copy"}) {
    const Status status = ParseTableMemory(wrong, &memory);
    CHECK(status.code == Code::kInvalidArgument);
    CHECK(std::strstr(status.message, "auto, inplace, hugepage_copy, mmap"));
    CHECK(std::strstr(status.message, (std::string("'") + wrong + "'").c_str()));
  }
}

void TestPlan() {
  constexpr TableSource kAnonymous = TableSource::kAnonymous, kFile = TableSource::kPrivateFile,
                        kOther = TableSource::kOther;
  constexpr int64_t kFree = 400 * int64_t{kMiB};
  for (const TableMemory memory : {kAuto, kInplace, kCopying, kMmap}) {
    CHECK(PlanTable(memory, kFile, kLargeTable - 1, kFree, true) == TablePlan::kStay);
    CHECK(PlanTable(memory, kAnonymous, kLargeTable, 0, true) ==
          (memory == kMmap ? TablePlan::kStay : TablePlan::kInPlace));
  }
  CHECK(PlanTable(kAuto, kFile, 300 * kMiB, kFree, true) == TablePlan::kCopy);
  CHECK(PlanTable(kAuto, kFile, 300 * kMiB + 1, kFree, true) == TablePlan::kStay);
  CHECK(PlanTable(kAuto, kFile, 300 * kMiB, kFree, false) == TablePlan::kStay);
  CHECK(PlanTable(kAuto, kFile, 300 * kMiB, -1, true) == TablePlan::kStay);
  CHECK(PlanTable(kAuto, kOther, 300 * kMiB, kFree, true) == TablePlan::kStay);
  CHECK(PlanTable(kInplace, kFile, 300 * kMiB, kFree, true) == TablePlan::kStay);
  CHECK(PlanTable(kMmap, kFile, 300 * kMiB, kFree, true) == TablePlan::kStay);
  CHECK(PlanTable(kCopying, kFile, 400 * kMiB, kFree, false) == TablePlan::kCopy);
  CHECK(PlanTable(kCopying, kOther, 400 * kMiB, kFree, true) == TablePlan::kCopy);
  CHECK(PlanTable(kCopying, kFile, 400 * kMiB + 1, kFree, true) == TablePlan::kNoMemory);
  CHECK(PlanTable(kCopying, kFile, 400 * kMiB, -1, true) == TablePlan::kCopy);
  CHECK(PlanTable(kAuto, kFile, SIZE_MAX / 2, kFree, true) == TablePlan::kStay);
}

void TestFreeMemory() {
  CHECK(FreeMemory() > 0);
  const auto free = [](const std::string& root) { return FreeMemory(root.c_str()); };
  const std::string v2 = g_folder + "/v2", v1 = g_folder + "/v1", host = g_folder + "/host";
  CHECK(free(v2) == -1);
  Write(v2 + "/proc/meminfo", "MemTotal:  9000 kB\nMemFree: 1 kB\nMemAvailable:    5000 kB\n");
  CHECK(free(v2) == 5000 * 1024);
  Write(v2 + "/proc/self/cgroup", "0::/a/b\n");
  const std::string groups = v2 + "/sys/fs/cgroup";
  Write(groups + "/a/b/memory.max", "max\n");
  Write(groups + "/a/b/memory.current", "1000\n");
  CHECK(free(v2) == 5000 * 1024);
  Write(groups + "/a/memory.max", "900000\n");  // a parent's limit holds too
  Write(groups + "/a/memory.current", "800000\n");
  CHECK(free(v2) == 100000);
  Write(groups + "/a/memory.stat", "anon 7\nactive_file 9\ninactive_file 50000\n");
  CHECK(free(v2) == 150000);
  Write(groups + "/a/b/memory.max", "500\n");  // below what is in use
  CHECK(free(v2) == 0);

  Write(v1 + "/proc/meminfo", "MemAvailable:    5000 kB\n");
  Write(v1 + "/proc/self/cgroup", "9:name=systemd:/\n4:cpu,memory:/x\n3:cpuset:/\n");
  const std::string mount = v1 + "/sys/fs/cgroup/memory";
  Write(mount + "/x/memory.limit_in_bytes", "9223372036854771712\n");
  Write(mount + "/x/memory.usage_in_bytes", "300\n");
  CHECK(free(v1) == 5000 * 1024);
  Write(mount + "/x/memory.limit_in_bytes", "1000\n");
  Write(mount + "/x/memory.stat", "inactive_file 1\ntotal_inactive_file 100\n");
  CHECK(free(v1) == 800);

  // In a container: the path is the host's, the mount the container's.
  Write(host + "/proc/meminfo", "MemAvailable:    5000 kB\n");
  Write(host + "/proc/self/cgroup", "0::/docker/0123\n");
  Write(host + "/sys/fs/cgroup/memory.max", "4096\n");
  Write(host + "/sys/fs/cgroup/memory.current", "96\n");
  CHECK(free(host) == 4000);
}

// A file of random bytes, mapped as the runtime does it.
class Mapped {
 public:
  Mapped(const std::string& path, size_t bytes, size_t offset, int flags = MAP_PRIVATE)
      : bytes_(bytes), page_(offset % 4096) {
    const int fd = open(path.c_str(), O_RDWR);
    data_ = static_cast<char*>(mmap(nullptr, bytes + page_, PROT_READ | PROT_WRITE, flags, fd,
                                    static_cast<off_t>(offset - page_)));
    CHECK(data_ != MAP_FAILED);
    close(fd);
  }
  Mapped(const Mapped&) = delete;
  Mapped& operator=(const Mapped&) = delete;
  ~Mapped() { munmap(data_, bytes_ + page_); }
  char* data() const { return data_ + page_; }

 private:
  size_t bytes_, page_;
  char* data_;
};

struct Placed {
  const void* table;
  std::shared_ptr<const void> keep;
  Status status;
};

Placed Place(TableMemory memory, const void* table, size_t bytes) {
  Placed placed = {table, nullptr, Status()};
  placed.status = PlaceTable(memory, bytes, {nullptr, nullptr}, &placed.table, &placed.keep);
  return placed;
}

std::string RandomBytes(size_t bytes) {
  std::string text(bytes, '\0');
  uint64_t state = 12345;
  for (char& c : text) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    c = static_cast<char>(state >> 56);
  }
  return text;
}

void MakeOld(const std::string& path) {
  const struct timespec times[2] = {{1000000000, 0}, {1000000000, 7}};
  CHECK(utimensat(AT_FDCWD, path.c_str(), times, 0) == 0);
}

void TestCopies() {
  constexpr size_t kOffset = 4096 + 49, kBytes = 9 * kMiB + 1234;
  const std::string path = g_folder + "/a table\nof two lines";
  std::string content = RandomBytes(kOffset + kBytes + 100);
  Write(path, content);
  MakeOld(path);
  const auto expect = [&](const Placed& placed, bool moved, const void* table) {
    CHECK(placed.status.ok());
    CHECK((placed.table != table) == moved && (placed.keep != nullptr) == moved);
    CHECK(std::memcmp(placed.table, content.data() + kOffset, kBytes) == 0);
  };
  const int64_t made = CountTableCopies().made;
  {
    const Mapped first(path, kBytes, kOffset), second(path, kBytes, kOffset);
    expect(Place(kInplace, first.data(), kBytes), false, first.data());
    expect(Place(kMmap, first.data(), kBytes), false, first.data());
    expect(Place(kCopying, first.data(), kLargeTable - 1), false, first.data());
    CHECK(CountTableCopies().living == 0 && CountTableCopies().made == made);

    // Every thread and both mappings get one copy, which lives as long as the last of them.
    std::vector<Placed> placed(4);
    std::vector<std::thread> threads;
    for (size_t i = 0; i < placed.size(); ++i) {
      threads.emplace_back([&, i] {
        placed[i] = Place(i % 2 ? kAuto : kCopying, (i < 2 ? first : second).data(), kBytes);
      });
    }
    for (std::thread& thread : threads) thread.join();
    CHECK(CountTableCopies().made == made + 1 || !HugePagesOffered());
    placed[1] = placed[3] = Placed();  // kAuto's, which do without where there are no huge pages
    expect(placed[0], true, first.data());
    CHECK(placed[0].table == placed[2].table);
    CHECK(reinterpret_cast<uintptr_t>(placed[0].table) % kHugePage == 0);
    CHECK(CountTableCopies().living == 1 && CountTableCopies().bytes == 10 * int64_t{kMiB});
    placed[0] = Placed();
    CHECK(CountTableCopies().living == 1);
    // Another part of the file is another table.
    const Placed part = Place(kCopying, first.data() + 1, kBytes - 1);
    CHECK(CountTableCopies().living == 2 && part.table != placed[2].table);
    CHECK(std::memcmp(part.table, content.data() + kOffset + 1, kBytes - 1) == 0);

    // The file is cut off: what was copied answers on.
    CHECK(truncate(path.c_str(), 100) == 0);
    expect(placed[2], true, second.data());
    MakeOld(path);
    const Placed cut = Place(kCopying, first.data(), kBytes);
    CHECK(cut.status.code == Code::kInternal && std::strstr(cut.status.message, "cut off"));
    CHECK(!cut.keep && cut.table == first.data());
    const Placed without = Place(kAuto, first.data(), kBytes);
    CHECK(without.status.ok() && !without.keep && without.table == first.data());
  }
  CHECK(CountTableCopies().living == 0 && CountTableCopies().bytes == 0);

  // Changed in place within the same tick of the clock: the same key, other content.
  content = RandomBytes(kOffset + kBytes + 100);
  Write(path, content);
  struct timespec times[2];
  clock_gettime(CLOCK_REALTIME, &times[0]);
  times[1] = times[0];
  CHECK(utimensat(AT_FDCWD, path.c_str(), times, 0) == 0);
  {
    const Mapped mapped(path, kBytes, kOffset);
    const Placed before = Place(kCopying, mapped.data(), kBytes);
    expect(before, true, mapped.data());
    const Placed same = Place(kCopying, mapped.data(), kBytes);
    CHECK(same.table == before.table);
    content[kOffset + kBytes - 1] ^= 1;
    {
      std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
      file.seekp(kOffset + kBytes - 1);
      file.put(content[kOffset + kBytes - 1]);
    }
    CHECK(utimensat(AT_FDCWD, path.c_str(), times, 0) == 0);
    const Placed after = Place(kCopying, mapped.data(), kBytes);
    CHECK(after.table != before.table);
    expect(after, true, mapped.data());
  }
  {  // Changed in place, with its old time of change put back: another time tells.
    MakeOld(path);
    const Mapped mapped(path, kBytes, kOffset);
    const Placed before = Place(kCopying, mapped.data(), kBytes);
    expect(before, true, mapped.data());
    content[kOffset + 99] ^= 1;
    {
      std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
      file.seekp(kOffset + 99);
      file.put(content[kOffset + 99]);
    }
    MakeOld(path);
    const Placed after = Place(kCopying, mapped.data(), kBytes);
    CHECK(after.table != before.table);
    expect(after, true, mapped.data());
  }
  {  // What the process wrote to its own mapping is the table, not what the file has.
    MakeOld(path);
    const Mapped mapped(path, kBytes, kOffset);
    mapped.data()[5] ^= 1;
    const Placed placed = Place(kCopying, mapped.data(), kBytes);
    CHECK(placed.keep && static_cast<const char*>(placed.table)[5] == mapped.data()[5]);
    const Mapped untouched(path, kBytes, kOffset);
    const Placed other = Place(kCopying, untouched.data(), kBytes);
    CHECK(other.table != placed.table);
    expect(other, true, untouched.data());
    CHECK(static_cast<const char*>(placed.table)[5] == mapped.data()[5]);
    mapped.data()[6] ^= 1;
    const Placed again = Place(kCopying, mapped.data(), kBytes);
    CHECK(again.keep && static_cast<const char*>(again.table)[6] == mapped.data()[6]);
  }
  {  // A shared mapping moves only for those who insist.
    const Mapped shared(path, kBytes, kOffset, MAP_SHARED);
    expect(Place(kAuto, shared.data(), kBytes), false, shared.data());
    expect(Place(kCopying, shared.data(), kBytes), true, shared.data());
  }
  {  // Without its name.
    const Mapped mapped(path, kBytes, kOffset);
    CHECK(unlink(path.c_str()) == 0);
    const Placed one = Place(kCopying, mapped.data(), kBytes);
    const Placed two = Place(kCopying, mapped.data(), kBytes);
    expect(one, true, mapped.data());
    CHECK(one.table == two.table && CountTableCopies().living == 1);
  }
  CHECK(CountTableCopies().living == 0 && CountTableCopies().bytes == 0);
  {  // Anonymous memory stays where it is.
    const std::vector<char> memory(kBytes, 'x');
    for (const TableMemory choice : {kAuto, kInplace, kCopying, kMmap}) {
      const Placed placed = Place(choice, memory.data(), kBytes);
      CHECK(placed.status.ok() && placed.table == memory.data() && !placed.keep);
    }
    CHECK(memory[kBytes / 2] == 'x');
  }
}

void TestJoinedRows() {
  // Small, and large enough to be on huge pages.
  for (const size_t rows : {size_t{0}, size_t{1}, size_t{1000}, size_t{400000}}) {
    const std::string codes = RandomBytes(rows * 21), scale = RandomBytes(rows * 4);
    const std::string bias = RandomBytes(rows * 2);
    const RowPart parts[] = {{codes.data(), 21}, {scale.data(), 4}, {bias.data(), 2}};
    for (const TableMemory memory : {kAuto, kInplace, kCopying, kMmap}) {
      const TableCopies before = CountTableCopies();
      const JoinedRows joined = JoinRows(memory, parts, 3, rows, {nullptr, nullptr});
      const bool large = rows * 27 >= kLargeTable;
      if (memory == kInplace || memory == kMmap || rows == 0) {
        CHECK(!joined.memory);
        continue;
      }
      CHECK(joined.memory || (large && !HugePagesOffered()));
      if (!joined.memory) continue;
      CHECK(joined.stride == 27);
      CHECK(CountTableCopies().living == before.living + large);
      for (size_t i = 0; i < rows; ++i) {
        const char* const row = joined.data + i * joined.stride;
        CHECK(std::memcmp(row, codes.data() + i * 21, 21) == 0);
        CHECK(std::memcmp(row + 21, scale.data() + i * 4, 4) == 0);
        CHECK(std::memcmp(row + 25, bias.data() + i * 2, 2) == 0);
      }
    }
    CHECK(CountTableCopies().living == 0);
  }
}

// While one thread makes one copy after another, children are forked, and make copies too.
[[maybe_unused]] void TestFork() {
  constexpr size_t kBytes = 64 * kMiB;
  const std::string path = g_folder + "/forked", small = g_folder + "/forked too";
  Write(path, "");
  Write(small, "");
  CHECK(truncate(path.c_str(), kBytes) == 0 && truncate(small.c_str(), kLargeTable) == 0);
  const Mapped mapped(path, kBytes, 0), other(small, kLargeTable, 0);
  std::atomic<bool> stop{false};
  std::thread copying([&] {
    while (!stop) CHECK(Place(kCopying, mapped.data(), kBytes).status.ok());
  });
  for (int i = 0; i < 5; ++i) {
    usleep(50000);
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      const Placed placed = Place(kCopying, other.data(), kLargeTable);
      _exit(placed.status.ok() && placed.keep ? 0 : 1);
    }
    int status = -1;
    CHECK(child > 0 && waitpid(child, &status, 0) == child);
    CHECK(status == 0, "child %d ended with %d", i, status);
  }
  stop = true;
  copying.join();
  CHECK(Place(kCopying, other.data(), kLargeTable).keep != nullptr);
}

[[maybe_unused]] void TestNoMemory() {
  const std::string path = g_folder + "/large";
  constexpr size_t kBytes = 256 * kMiB;
  Write(path, "");
  CHECK(truncate(path.c_str(), kBytes) == 0);
  const Mapped mapped(path, kBytes, 0);
  struct rlimit before, limit;
  CHECK(getrlimit(RLIMIT_AS, &before) == 0);
  limit = before;
  long pages = 0;
  std::ifstream("/proc/self/statm") >> pages;
  limit.rlim_cur = static_cast<rlim_t>(pages) * 4096 + 64 * kMiB;
  CHECK(setrlimit(RLIMIT_AS, &limit) == 0);
  void* const more = mmap(nullptr, kBytes, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (more != MAP_FAILED) {
    munmap(more, kBytes);
    // qemu-user takes the limit and does not keep it.
    CHECK(std::getenv("LUCID_EMULATED"), "RLIMIT_AS limits nothing, and LUCID_EMULATED is not set");
    std::printf("skipped: a lack of memory, as RLIMIT_AS limits nothing here\n");
    return;
  }
  const Placed refused = Place(kCopying, mapped.data(), kBytes);
  CHECK(refused.status.code == Code::kOutOfMemory && !refused.keep);
  CHECK(std::strstr(refused.status.message, "needs 268435456 bytes"));
  const Placed without = Place(kAuto, mapped.data(), kBytes);
  CHECK(without.status.ok() && without.table == mapped.data() && !without.keep);
  CHECK(setrlimit(RLIMIT_AS, &before) == 0);
  CHECK(CountTableCopies().living == 0);
}

}  // namespace
}  // namespace lucid

int main() {
  std::string name = std::filesystem::temp_directory_path() / "lucid_table_memory_XXXXXX";
  if (!mkdtemp(&name[0])) return 1;
  lucid::g_folder = name;
  lucid::TestParse();
  lucid::TestPlan();
  lucid::TestFreeMemory();
  lucid::TestCopies();
  lucid::TestJoinedRows();
#if !defined(__SANITIZE_THREAD__) && !defined(__SANITIZE_ADDRESS__)  // whose locks a child inherits
  lucid::TestFork();
#endif
#if !defined(__SANITIZE_ADDRESS__)  // whose shadow is larger than any limit
  lucid::TestNoMemory();
#endif
  const std::string remove = "rm -rf " + lucid::g_folder;
  if (std::system(remove.c_str()) != 0) return 1;
  std::printf("%d failures\n", lucid::g_failures);
  return lucid::g_failures != 0;
}

#else

int main() {
  lucid::TableMemory memory;
  const void* table = nullptr;
  std::shared_ptr<const void> keep;
  const bool good =
      lucid::ParseTableMemory("hugepage_copy", &memory).ok() &&
      !lucid::PlaceTable(memory, lucid::kLargeTable, {nullptr, nullptr}, &table, &keep).ok();
  std::printf("%d failures\n", !good);
  return !good;
}

#endif
