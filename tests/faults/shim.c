/* A layer between a process and its disk that fails on purpose; preloaded, dormant until `fault_arm` is called.
 *
 * It watches the calls that change files below one directory, counts those of the chosen kinds, and acts on the
 * first-th to last-th of them: the process dies before or after the call, in the middle of a write, the call fails with
 * an errno, writes a single byte, or takes long. It can also keep a log of everything that was done, with the bytes.
 * Only calls of the C library are seen.
 *
 * shim.py is its other half; the constants below are repeated there.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

enum { CREATE = 1, READ = 2, WRITE = 4, FSYNC = 8, RENAME = 16, UNLINK = 32, MKDIR = 64, RMDIR = 128, TRUNCATE = 256 };
enum { SYNC_DIRECTORY = 512, MAP = 1024, LOCK = 2048 }; /* operations that a file system may lack */
enum { COUNT, EXIT_BEFORE, EXIT_AFTER, EXIT_TORN, FAIL, SHORT, SLEEP };
#define KILLED 137

static atomic_int armed;
static atomic_long seen;
static char root[PATH_MAX], pattern[256];
static int mode, kinds, code, milliseconds, log_descriptor = -1;
static long first, last;
static pthread_mutex_t order = PTHREAD_MUTEX_INITIALIZER; /* the log lists the calls in the order they happened */

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

static ssize_t plain_write(int descriptor, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    return real(descriptor, data, size);
}

/* --- called by shim.py --------------------------------------------------------------------------------------- */

int fault_arm(const char *directory, int how, int which, long from, long until, int number, int wait,
              const char *names, const char *log) {
    if (!realpath(directory, root)) return -1;
    snprintf(pattern, sizeof pattern, "%s", names);
    mode = how, kinds = which, first = from, last = until, code = number, milliseconds = wait;
    if (log_descriptor >= 0) close(log_descriptor);
    log_descriptor = *log ? open(log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644) : -1;
    if (*log && log_descriptor < 0) return -1;
    atomic_store(&seen, 0);
    atomic_store(&armed, 1);
    return 0;
}

long fault_disarm(void) {
    atomic_store(&armed, 0);
    if (log_descriptor >= 0) close(log_descriptor);
    log_descriptor = -1;
    return atomic_load(&seen);
}

long fault_count(void) { return atomic_load(&seen); }

/* --- which call this is ---------------------------------------------------------------------------------------- */

static int is_below_root(const char *path) {
    size_t length = strlen(root);
    if (strncmp(path, root, length) || (path[length] != '/' && path[length])) return 0;
    const char *name = strrchr(path, '/');
    return !fnmatch(pattern, name ? name + 1 : path, 0);
}

static int path_of_descriptor(int descriptor, char *path) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, PATH_MAX - 1);
    path[length < 0 ? 0 : length] = 0;
    return length > 0;
}

/* Make `name` absolute; it is relative to the directory that `folder` has open. */
static int absolute(int folder, const char *name, char *path) {
    if (*name == '/') return snprintf(path, PATH_MAX, "%s", name) < PATH_MAX;
    char base[PATH_MAX];
    if (folder == AT_FDCWD ? !getcwd(base, sizeof base) : !path_of_descriptor(folder, base)) return 0;
    size_t length = strlen(base);
    if (length + strlen(name) + 2 > PATH_MAX) return 0;
    memcpy(path, base, length);
    path[length] = '/';
    strcpy(path + length + 1, name);
    return 1;
}

static int hits(int kind, const char *path) { /* whether this call is one to act on; counts it */
    if (!(kinds & kind) || !is_below_root(path)) return 0;
    long number = atomic_fetch_add(&seen, 1) + 1;
    return number >= first && number <= last;
}

static void pause_for(int wait) {
    struct timespec left = {wait / 1000, (wait % 1000) * 1000000L};
    while (nanosleep(&left, &left) && errno == EINTR) continue;
}

/* Act before the call. Returns whether the call must fail, with errno set. */
static int before(int hit) {
    if (!hit) return 0;
    if (mode == EXIT_BEFORE) _exit(KILLED);
    if (mode == SLEEP) pause_for(milliseconds);
    if (mode == FAIL) errno = code;
    return mode == FAIL;
}

static void after(int hit) {
    if (hit && (mode == EXIT_AFTER || mode == EXIT_TORN)) _exit(KILLED);
}

/* One entry of the log: a line with kind, paths, offset and length, then `length` bytes. */
static void record(const char *kind, const char *path, const char *to, off_t offset, const void *data, size_t length) {
    int keep = errno;
    char *entry = malloc(2 * PATH_MAX + 128 + length);
    if (!entry) abort();
    int size = sprintf(entry, "%s\t%s\t%s\t%lld\t%zu\n", kind, path, to, (long long)offset, length);
    if (length) memcpy(entry + size, data, length);
    if (plain_write(log_descriptor, entry, size + length) != (ssize_t)(size + length)) abort();
    free(entry);
    errno = keep;
}

void fault_mark(const char *text) {
    if (log_descriptor >= 0) record("mark", text, "", 0, "", 0);
}

static int begin_log(const char *path) {
    int wanted = log_descriptor >= 0 && !strncmp(path, root, strlen(root));
    if (wanted) pthread_mutex_lock(&order);
    return wanted;
}

static void end_log(int wanted) {
    if (wanted) pthread_mutex_unlock(&order);
}

/* --- the calls ------------------------------------------------------------------------------------------------- */

typedef int (*opener)(int, const char *, int, mode_t);

static int watched_open(opener call, int folder, const char *name, int flags, mode_t permissions) {
    char path[PATH_MAX];
    if (!atomic_load(&armed) || !absolute(folder, name, path)) return call(folder, name, flags, permissions);
    int changes = flags & (O_CREAT | O_TRUNC), hit = hits(changes ? CREATE : READ, path);
    if (before(hit)) return -1;
    int logging = begin_log(path), is_new = logging && changes && access(path, F_OK);
    int descriptor = call(folder, name, flags, permissions);
    if (logging && descriptor >= 0 && is_new) record("create", path, "", 0, "", 0);
    if (logging && descriptor >= 0 && !is_new && (flags & O_TRUNC)) record("truncate", path, "", 0, "", 0);
    end_log(logging);
    after(hit);
    return descriptor;
}

static int by_openat(int folder, const char *name, int flags, mode_t permissions) {
    REAL(int, "openat", int, const char *, int, mode_t);
    return real(folder, name, flags, permissions);
}

#define PERMISSIONS(flags) \
    mode_t permissions = 0; \
    if ((flags) & O_CREAT) { \
        va_list rest; \
        va_start(rest, flags); \
        permissions = va_arg(rest, mode_t); \
        va_end(rest); \
    }

int open(const char *name, int flags, ...) {
    PERMISSIONS(flags)
    return watched_open(by_openat, AT_FDCWD, name, flags, permissions);
}

int open64(const char *name, int flags, ...) {
    PERMISSIONS(flags)
    return watched_open(by_openat, AT_FDCWD, name, flags | O_LARGEFILE, permissions);
}

int openat(int folder, const char *name, int flags, ...) {
    PERMISSIONS(flags)
    return watched_open(by_openat, folder, name, flags, permissions);
}

int openat64(int folder, const char *name, int flags, ...) {
    PERMISSIONS(flags)
    return watched_open(by_openat, folder, name, flags | O_LARGEFILE, permissions);
}

/* A write at the file's own position (at < 0) or at a given one. */
static ssize_t plain_write_at(int descriptor, const void *data, size_t size, off_t at) {
    REAL(ssize_t, "pwrite", int, const void *, size_t, off_t);
    return at < 0 ? plain_write(descriptor, data, size) : real(descriptor, data, size, at);
}

static ssize_t watched_write(int descriptor, const void *data, size_t size, off_t at) {
    char path[PATH_MAX];
    if (!atomic_load(&armed) || descriptor == log_descriptor || !path_of_descriptor(descriptor, path))
        return plain_write_at(descriptor, data, size, at);
    int hit = hits(WRITE, path);
    if (before(hit)) return -1;
    if (hit && mode == EXIT_TORN) size /= 2;
    if (hit && mode == SHORT && size > 1) size = 1;
    int logging = begin_log(path);
    ssize_t written = plain_write_at(descriptor, data, size, at);
    if (logging && written > 0)
        record("write", path, "", at < 0 ? lseek(descriptor, 0, SEEK_CUR) - written : at, data, written);
    end_log(logging);
    after(hit);
    return written;
}

ssize_t write(int descriptor, const void *data, size_t size) { return watched_write(descriptor, data, size, -1); }

ssize_t pwrite(int descriptor, const void *data, size_t size, off_t at) {
    return watched_write(descriptor, data, size, at);
}

ssize_t pwrite64(int descriptor, const void *data, size_t size, off64_t at) {
    return watched_write(descriptor, data, size, at);
}

/* Several buffers at once: one write of their concatenation, which is what the kernel makes of it. */
static ssize_t gathered_write(int descriptor, const struct iovec *parts, int count, off_t at) {
    size_t size = 0;
    for (int i = 0; i < count; i++) size += parts[i].iov_len;
    char *all = malloc(size ? size : 1), *end = all;
    if (!all) return errno = ENOMEM, -1;
    for (int i = 0; i < count; end += parts[i++].iov_len) memcpy(end, parts[i].iov_base, parts[i].iov_len);
    ssize_t written = watched_write(descriptor, all, size, at);
    free(all);
    return written;
}

ssize_t writev(int descriptor, const struct iovec *parts, int count) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    return atomic_load(&armed) ? gathered_write(descriptor, parts, count, -1) : real(descriptor, parts, count);
}

ssize_t pwritev(int descriptor, const struct iovec *parts, int count, off_t at) {
    REAL(ssize_t, "pwritev", int, const struct iovec *, int, off_t);
    return atomic_load(&armed) ? gathered_write(descriptor, parts, count, at) : real(descriptor, parts, count, at);
}

/* The calls with one descriptor or one or two paths differ only in their arguments. */
#define WATCHED(kind, label, path, to, at, call) \
    do { \
        int hit = hits(kind, path); \
        if (before(hit)) return -1; \
        int logging = begin_log(path), result = (call); \
        if (logging && !result) record(label, path, to, at, "", 0); \
        end_log(logging); \
        after(hit); \
        return result; \
    } while (0)

int fsync(int descriptor) {
    REAL(int, "fsync", int);
    char path[PATH_MAX];
    struct stat file;
    if (!atomic_load(&armed) || !path_of_descriptor(descriptor, path)) return real(descriptor);
    if (!fstat(descriptor, &file) && S_ISDIR(file.st_mode) && before(hits(SYNC_DIRECTORY, path))) return -1;
    WATCHED(FSYNC, "fsync", path, "", 0, real(descriptor));
}

int fdatasync(int descriptor) {
    REAL(int, "fdatasync", int);
    char path[PATH_MAX];
    if (!atomic_load(&armed) || !path_of_descriptor(descriptor, path)) return real(descriptor);
    WATCHED(FSYNC, "fsync", path, "", 0, real(descriptor));
}

int flock(int descriptor, int operation) {
    REAL(int, "flock", int, int);
    char path[PATH_MAX];
    int watched = atomic_load(&armed) && path_of_descriptor(descriptor, path);
    return watched && before(hits(LOCK, path)) ? -1 : real(descriptor, operation);
}

void *mmap(void *address, size_t length, int protection, int flags, int descriptor, off_t offset) {
    REAL(void *, "mmap", void *, size_t, int, int, int, off_t);
    char path[PATH_MAX];
    int watched = atomic_load(&armed) && descriptor >= 0 && path_of_descriptor(descriptor, path);
    if (watched && before(hits(MAP, path))) return MAP_FAILED;
    return real(address, length, protection, flags, descriptor, offset);
}

void *mmap64(void *address, size_t length, int protection, int flags, int descriptor, off64_t offset) {
    return mmap(address, length, protection, flags, descriptor, offset);
}

static int watched_truncate(int descriptor, off_t length) {
    REAL(int, "ftruncate", int, off_t);
    char path[PATH_MAX];
    if (!atomic_load(&armed) || !path_of_descriptor(descriptor, path)) return real(descriptor, length);
    WATCHED(TRUNCATE, "truncate", path, "", length, real(descriptor, length));
}

int ftruncate(int descriptor, off_t length) { return watched_truncate(descriptor, length); }

int ftruncate64(int descriptor, off64_t length) { return watched_truncate(descriptor, length); }

static int watched_rename(int folder, const char *name, int new_folder, const char *new_name) {
    REAL(int, "renameat", int, const char *, int, const char *);
    char path[PATH_MAX], to[PATH_MAX];
    if (!atomic_load(&armed) || !absolute(folder, name, path) || !absolute(new_folder, new_name, to))
        return real(folder, name, new_folder, new_name);
    WATCHED(RENAME, "rename", path, to, 0, real(folder, name, new_folder, new_name));
}

int rename(const char *name, const char *new_name) { return watched_rename(AT_FDCWD, name, AT_FDCWD, new_name); }

int renameat(int folder, const char *name, int new_folder, const char *new_name) {
    return watched_rename(folder, name, new_folder, new_name);
}

static int watched_unlink(int folder, const char *name, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    char path[PATH_MAX];
    if (!atomic_load(&armed) || !absolute(folder, name, path)) return real(folder, name, flags);
    int kind = flags & AT_REMOVEDIR ? RMDIR : UNLINK;
    WATCHED(kind, kind == RMDIR ? "rmdir" : "unlink", path, "", 0, real(folder, name, flags));
}

int unlink(const char *name) { return watched_unlink(AT_FDCWD, name, 0); }

int rmdir(const char *name) { return watched_unlink(AT_FDCWD, name, AT_REMOVEDIR); }

int unlinkat(int folder, const char *name, int flags) { return watched_unlink(folder, name, flags); }

static int watched_mkdir(int folder, const char *name, mode_t permissions) {
    REAL(int, "mkdirat", int, const char *, mode_t);
    char path[PATH_MAX];
    if (!atomic_load(&armed) || !absolute(folder, name, path)) return real(folder, name, permissions);
    WATCHED(MKDIR, "mkdir", path, "", 0, real(folder, name, permissions));
}

int mkdir(const char *name, mode_t permissions) { return watched_mkdir(AT_FDCWD, name, permissions); }

int mkdirat(int folder, const char *name, mode_t permissions) { return watched_mkdir(folder, name, permissions); }
