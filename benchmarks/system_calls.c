/* Counts the system calls that change files below one directory, and lets one of them fail.

   Preloaded into a process (LD_PRELOAD). `arm` chooses the directory, the fault and the call. Each counted call is one
   line of the log: its name and its path. Calls inside libc (stdio) are not seen; Python, Rust and Arrow do not use it. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

enum { NONE, KILL, TORN, ERROR, FULL, SHORT, SIGNAL };

static char root[PATH_MAX];
static size_t root_length;
static int fault, detail, log_file = -1;
static long chosen;
static atomic_long count;

/* Below `directory`, do `kind` at call `call`, counted from 1. `value` is the errno or the signal. */
void arm(const char *directory, int kind, int value, long call, int log) {
    root_length = strlen(strcpy(root, directory));
    fault = kind, detail = value, chosen = call, log_file = log;
    count = 0;
}

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int below(int directory, const char *path, char *full) {
    if (!log_file || log_file < 0 || !path) return 0;
    if (path[0] == '/') {
        snprintf(full, PATH_MAX, "%s", path);
    } else {
        char link[64];
        if (directory == AT_FDCWD) strcpy(link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        ssize_t length = readlink(link, full, PATH_MAX - 1);
        if (length < 0) return 0;
        snprintf(full + length, PATH_MAX - length, "%s%s", *path ? "/" : "", path);
    }
    return !strncmp(full, root, root_length) && (full[root_length] == '/' || !full[root_length]);
}

/* What to do at this call: 0 nothing, -1 fail with errno set, 1 write half, 2 write half (or all) and die. */
static int at_call(const char *name, const char *full, int takes_space) {
    long number = ++count;
    REAL(write);
    char line[PATH_MAX + 64];
    int length = snprintf(line, sizeof line, "%s %s\n", name, full + root_length);
    real(log_file, line, length);
    if (fault == FULL && number >= chosen && takes_space) return errno = detail, -1;
    if (number != chosen) return 0;
    if (fault == KILL) kill(getpid(), SIGKILL);
    if (fault == SIGNAL) kill(getpid(), detail);
    if (fault == ERROR) return errno = detail, -1;
    return fault == SHORT ? 1 : fault == TORN ? 2 : 0;
}

static void die(void) { kill(getpid(), SIGKILL); pause(); }

#define SIMPLE(type, name, parameters, arguments, directory, path, space) \
    type name parameters {                                                 \
        REAL(name);                                                        \
        char full[PATH_MAX];                                               \
        int todo = below(directory, path, full) ? at_call(#name, full, space) : 0; \
        if (todo < 0) return -1;                                           \
        type result = real arguments;                                      \
        if (todo == 2) die();                                              \
        return result;                                                     \
    }

#define WRITE(name, parameters, arguments, half)                           \
    ssize_t name parameters {                                              \
        REAL(name);                                                        \
        char full[PATH_MAX];                                               \
        int todo = below(file, "", full) ? at_call(#name, full, 1) : 0;    \
        if (todo < 0) return -1;                                           \
        if (todo > 0) { half; }                                            \
        ssize_t result = real arguments;                                   \
        if (todo == 2) die();                                              \
        return result;                                                     \
    }

#define HALF if (size > 1) size /= 2
WRITE(write, (int file, const void *data, size_t size), (file, data, size), HALF)
WRITE(pwrite, (int file, const void *data, size_t size, off_t at), (file, data, size, at), HALF)
WRITE(pwrite64, (int file, const void *data, size_t size, off64_t at), (file, data, size, at), HALF)
WRITE(writev, (int file, const struct iovec *parts, int size), (file, parts, size), HALF)

#define OPEN(name, parameters, arguments, directory)                       \
    int name parameters {                                                  \
        REAL(name);                                                        \
        mode_t mode = 0;                                                   \
        if (flags & (O_CREAT | O_TMPFILE)) {                               \
            va_list rest;                                                  \
            va_start(rest, flags), mode = va_arg(rest, mode_t), va_end(rest); \
        }                                                                  \
        char full[PATH_MAX];                                               \
        int changes = flags & (O_WRONLY | O_RDWR | O_CREAT | O_TRUNC);     \
        int todo = changes && below(directory, path, full) ? at_call("open", full, !!(flags & O_CREAT)) : 0; \
        if (todo < 0) return -1;                                           \
        int result = real arguments;                                       \
        if (todo == 2) die();                                              \
        return result;                                                     \
    }

OPEN(open, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(open64, (const char *path, int flags, ...), (path, flags, mode), AT_FDCWD)
OPEN(openat, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)
OPEN(openat64, (int at, const char *path, int flags, ...), (at, path, flags, mode), at)

SIMPLE(int, fsync, (int file), (file), file, "", 1)
SIMPLE(int, fdatasync, (int file), (file), file, "", 1)
SIMPLE(int, ftruncate, (int file, off_t size), (file, size), file, "", 1)
SIMPLE(int, ftruncate64, (int file, off64_t size), (file, size), file, "", 1)
SIMPLE(int, fallocate, (int file, int mode, off_t at, off_t size), (file, mode, at, size), file, "", 1)
SIMPLE(int, fallocate64, (int file, int mode, off64_t at, off64_t size), (file, mode, at, size), file, "", 1)
SIMPLE(int, fchmod, (int file, mode_t mode), (file, mode), file, "", 0)
SIMPLE(int, mkdir, (const char *path, mode_t mode), (path, mode), AT_FDCWD, path, 1)
SIMPLE(int, mkdirat, (int at, const char *path, mode_t mode), (at, path, mode), at, path, 1)
SIMPLE(int, unlink, (const char *path), (path), AT_FDCWD, path, 0)
SIMPLE(int, unlinkat, (int at, const char *path, int flags), (at, path, flags), at, path, 0)
SIMPLE(int, rmdir, (const char *path), (path), AT_FDCWD, path, 0)
SIMPLE(int, rename, (const char *from, const char *to), (from, to), AT_FDCWD, to, 1)
SIMPLE(int, renameat, (int a, const char *from, int at, const char *to), (a, from, at, to), at, to, 1)
SIMPLE(int, link, (const char *from, const char *to), (from, to), AT_FDCWD, to, 1)

/* posix_fallocate returns its error. */
static int reserve(int file, off64_t at, off64_t size, int (*real)(int, off64_t, off64_t)) {
    char full[PATH_MAX];
    int todo = below(file, "", full) ? at_call("posix_fallocate", full, 1) : 0;
    if (todo < 0) return errno;
    int result = real(file, at, size);
    if (todo == 2) die();
    return result;
}

int posix_fallocate(int file, off_t at, off_t size) {
    return reserve(file, at, size, (int (*)(int, off64_t, off64_t))dlsym(RTLD_NEXT, "posix_fallocate"));
}

int posix_fallocate64(int file, off64_t at, off64_t size) {
    return reserve(file, at, size, (int (*)(int, off64_t, off64_t))dlsym(RTLD_NEXT, "posix_fallocate64"));
}
