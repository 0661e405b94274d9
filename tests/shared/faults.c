/* Preloaded into a test's process: makes the n-th system call on files below a folder fail, or kills the process there.

   Calls are counted by kind (KIND_*), whoever makes them: Python, SQLite, the C library. A write that fails has written
   its first half, as a disk that fills up does. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/types.h>
#include <unistd.h>

enum { KIND_OPEN = 1, KIND_WRITE = 2, KIND_SYNC = 4, KIND_RENAME = 8, KIND_TRUNCATE = 16, KIND_READ = 32 };
enum { ACTION_NONE, ACTION_FAIL_ONCE, ACTION_FAIL_FROM, ACTION_KILL_BEFORE, ACTION_KILL_AFTER };

static char folder[4096];
static size_t folder_length;
static long counted, target;
static int kinds, action, error_number;

void faults_arm(const char *below, int which, long nth, int what, int error) {
    action = ACTION_NONE;
    folder_length = strlen(below);
    memcpy(folder, below, folder_length + 1);
    kinds = which, counted = 0, target = nth, error_number = error;
    action = what;
}

long faults_disarm(void) {
    action = ACTION_NONE;
    return counted;
}

static int is_below(const char *path) { return folder_length && strncmp(path, folder, folder_length) == 0; }

static int is_below_fd(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return is_below(path);
}

/* Whether this call fails; kills if it is this call's turn to die before it. */
static int begins(int kind, int concerned) {
    if (action == ACTION_NONE || !(kinds & kind) || !concerned) return 0;
    counted++;
    if (counted == target && action == ACTION_KILL_BEFORE) kill(getpid(), SIGKILL);
    int fails = (action == ACTION_FAIL_ONCE && counted == target) || (action == ACTION_FAIL_FROM && counted >= target);
    if (fails) errno = error_number;
    return fails;
}

static void ends(int kind, int concerned) {
    if (action == ACTION_KILL_AFTER && (kinds & kind) && concerned && counted == target) kill(getpid(), SIGKILL);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                             \
    int name(const char *path, int flags, ...) {               \
        va_list rest;                                          \
        va_start(rest, flags);                                 \
        mode_t mode = va_arg(rest, mode_t);                    \
        va_end(rest);                                          \
        int concerned = is_below(path);                        \
        if (begins(KIND_OPEN, concerned)) return -1;           \
        int result = REAL(name)(path, flags, mode);            \
        ends(KIND_OPEN, concerned);                            \
        return result;                                         \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int fd, const void *content, size_t size) {
    int concerned = action != ACTION_NONE && is_below_fd(fd);
    if (begins(KIND_WRITE, concerned)) {
        if (size > 1) REAL(write)(fd, content, size / 2);
        errno = error_number;
        return -1;
    }
    ssize_t result = REAL(write)(fd, content, size);
    ends(KIND_WRITE, concerned);
    return result;
}

#define PWRITE(name, offset_type)                                        \
    ssize_t name(int fd, const void *content, size_t size, offset_type at) { \
        int concerned = action != ACTION_NONE && is_below_fd(fd);        \
        if (begins(KIND_WRITE, concerned)) {                             \
            if (size > 1) REAL(name)(fd, content, size / 2, at);         \
            errno = error_number;                                        \
            return -1;                                                   \
        }                                                                \
        ssize_t result = REAL(name)(fd, content, size, at);              \
        ends(KIND_WRITE, concerned);                                     \
        return result;                                                   \
    }
PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

#define ON_FD(name, kind, parameters, arguments)                  \
    int name parameters {                                         \
        int concerned = action != ACTION_NONE && is_below_fd(fd); \
        if (begins(kind, concerned)) return -1;                   \
        int result = REAL(name) arguments;                        \
        ends(kind, concerned);                                    \
        return result;                                            \
    }
ON_FD(fsync, KIND_SYNC, (int fd), (fd))
ON_FD(fdatasync, KIND_SYNC, (int fd), (fd))
ON_FD(ftruncate, KIND_TRUNCATE, (int fd, off_t size), (fd, size))
ON_FD(ftruncate64, KIND_TRUNCATE, (int fd, off64_t size), (fd, size))

#define READ(name, parameters, arguments)                         \
    ssize_t name parameters {                                     \
        int concerned = action != ACTION_NONE && is_below_fd(fd); \
        if (begins(KIND_READ, concerned)) return -1;              \
        ssize_t result = REAL(name) arguments;                    \
        ends(KIND_READ, concerned);                               \
        return result;                                            \
    }
READ(read, (int fd, void *content, size_t size), (fd, content, size))
READ(pread, (int fd, void *content, size_t size, off_t at), (fd, content, size, at))
READ(pread64, (int fd, void *content, size_t size, off64_t at), (fd, content, size, at))

#define ON_PATHS(name)                                             \
    int name(const char *from, const char *to) {                   \
        int concerned = is_below(from) || is_below(to);            \
        if (begins(KIND_RENAME, concerned)) return -1;             \
        int result = REAL(name)(from, to);                         \
        ends(KIND_RENAME, concerned);                              \
        return result;                                             \
    }
ON_PATHS(rename)
ON_PATHS(link)

int unlink(const char *path) {
    int concerned = is_below(path);
    if (begins(KIND_RENAME, concerned)) return -1;
    int result = REAL(unlink)(path);
    ends(KIND_RENAME, concerned);
    return result;
}
