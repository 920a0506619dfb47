/* Counts the changes that a process makes below a directory, and disturbs the n-th of them.

The library is preloaded, so it also sees the writes of Rust (safetensors, tokenizers) and C++ (torch, Arrow). The writer
of safetensors renames without the C library, so the kernel reports renames with a signal (seccomp). Writes through
memory maps and by fwrite are not seen; tests/faults/test_faults.py finds such files. Nothing is
counted before `faults_arm`. Syncs cost no time: the disk is not asked. Every change makes one line of the journal: number, operation, path, second path or "-",
bytes or number of the copy. A change that failed has the operation "failed", its own as second path, and the error. Paths are relative to the directory. After each sync of a file, the library copies the file
to <copies>/<number>. This is the content that a power cut would leave. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <stddef.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <ucontext.h>
#include <unistd.h>

enum { NOTHING, KILL, TEAR, FAIL };

static char root[PATH_MAX], copies[PATH_MAX];
static size_t root_length;
static int journal = -1, kind, error_number, is_lasting;
static long at, count;
static pid_t armed_process;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

enum { OURS = 0x0fa17 }; /* sixth argument of our own renames, which the kernel does not report */

static void report_renames(void) {
    struct sock_filter filter[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rename, 2, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat, 1, 0),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_renameat2, 0, 3),
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[5])),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, OURS, 1, 0),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_TRAP),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof filter / sizeof filter[0], filter};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
        perror("the kernel does not report renames"), _exit(70);
}

/* Start to count. `is_lasting`: from the n-th change on, every change that needs space fails, as on a full disk. */
void faults_arm(const char *directory, const char *journal_path, const char *copies_path, int fault, long number,
                int error, int lasting) {
    snprintf(root, sizeof root, "%s", directory);
    snprintf(copies, sizeof copies, "%s", copies_path);
    root_length = strlen(root);
    kind = fault, at = number, error_number = error, is_lasting = lasting, count = 0;
    journal = syscall(SYS_openat, AT_FDCWD, journal_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
    armed_process = getpid();
    report_renames();
}

static int is_below(const char *path) {
    return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

/* Write the absolute path without "." and "..", and return whether it is below the directory. */
static int resolve(int directory, const char *path, char *out) {
    char whole[2 * PATH_MAX], link[64];
    if (journal < 0 || armed_process != getpid() || path == NULL) return 0;
    if (path[0] == '/') {
        snprintf(whole, sizeof whole, "%s", path);
    } else {
        char base[PATH_MAX];
        ssize_t size;
        if (directory == AT_FDCWD) snprintf(link, sizeof link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", directory);
        if ((size = syscall(SYS_readlinkat, AT_FDCWD, link, base, sizeof base - 1)) < 0) return 0;
        base[size] = 0;
        snprintf(whole, sizeof whole, "%s/%s", base, path);
    }
    size_t end = 0;
    char *rest = whole, *part;
    while ((part = strsep(&rest, "/")) != NULL) {
        if (*part == 0 || strcmp(part, ".") == 0) continue;
        if (strcmp(part, "..") == 0) {
            while (end > 0 && out[--end] != '/') {}
            continue;
        }
        if (end + strlen(part) + 2 > PATH_MAX) return 0;
        out[end++] = '/';
        strcpy(out + end, part), end += strlen(part);
    }
    out[end] = 0;
    return is_below(out);
}

/* Write the path of an open file, and return whether it is below the directory. */
static int path_of(int file, char *out) {
    char link[64];
    ssize_t size;
    if (journal < 0 || armed_process != getpid()) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    if ((size = syscall(SYS_readlinkat, AT_FDCWD, link, out, PATH_MAX - 1)) < 0) return 0;
    out[size] = 0;
    return is_below(out) && strstr(out, " (deleted)") == NULL;
}

static int needs_space(const char *operation) {
    return strcmp(operation, "write") == 0 || strcmp(operation, "create") == 0 || strcmp(operation, "mkdir") == 0 ||
           strcmp(operation, "link") == 0;
}

/* Count a change. Return TEAR or FAIL if it must be disturbed. Until `end`, no other thread can change anything. */
static int begin(const char *operation) {
    pthread_mutex_lock(&lock);
    ++count;
    if (kind == FAIL && is_lasting ? count >= at && needs_space(operation) : count == at && kind != NOTHING) {
        if (kind == KILL) {
            syscall(SYS_kill, getpid(), SIGKILL);
            for (;;) pause();
        }
        if (kind == FAIL) errno = error_number;
        return kind;
    }
    return NOTHING;
}

static void end(const char *operation, const char *path, const char *other, long number, int is_done) {
    char line[2 * PATH_MAX + 64];
    const char *second = other == NULL ? "-" : is_below(other) ? other + root_length + 1 : other;
    const char *first = path[root_length] == 0 ? "." : path + root_length + 1;
    int before = errno;
    if (!is_done) second = operation, operation = "failed", number = before;
    int size = snprintf(line, sizeof line, "%ld\t%s\t%s\t%s\t%ld\n", count, operation, first, second, number);
    syscall(SYS_write, journal, line, size);
    errno = before;
    pthread_mutex_unlock(&lock);
}

/* --- names --- */

#define CHANGE(operation, path, other, number, call)                 \
    do {                                                             \
        if (begin(operation) == FAIL) {                              \
            int failure = errno;                                     \
            end(operation, path, other, 0, 0);                       \
            errno = failure;                                         \
            return -1;                                               \
        }                                                            \
        long result = (call);                                        \
        end(operation, path, other, number, result >= 0);            \
        return result;                                               \
    } while (0)

static int open_at(int directory, const char *path, int flags, mode_t mode) {
    char place[PATH_MAX];
    struct stat found;
    if ((flags & (O_CREAT | O_TRUNC)) && resolve(directory, path, place)) {
        int is_there = fstatat(directory, path, &found, 0) == 0;
        if (!is_there && (flags & O_CREAT))
            CHANGE("create", place, NULL, 0, syscall(SYS_openat, directory, path, flags, mode));
        if (is_there && (flags & O_TRUNC) && found.st_size > 0)
            CHANGE("truncate", place, NULL, 0, syscall(SYS_openat, directory, path, flags, mode));
    }
    return syscall(SYS_openat, directory, path, flags, mode);
}

#define MODE(flags, last)                            \
    mode_t mode = 0;                                 \
    if (flags & (O_CREAT | O_TMPFILE)) {             \
        va_list arguments;                           \
        va_start(arguments, last);                   \
        mode = va_arg(arguments, mode_t);            \
        va_end(arguments);                           \
    }

int open(const char *path, int flags, ...) { MODE(flags, flags) return open_at(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags, flags) return open_at(AT_FDCWD, path, flags, mode); }
int openat(int at, const char *path, int flags, ...) { MODE(flags, flags) return open_at(at, path, flags, mode); }
int openat64(int at, const char *path, int flags, ...) { MODE(flags, flags) return open_at(at, path, flags, mode); }
int creat(const char *path, mode_t mode) { return open_at(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

/* C++ opens files with fopen, and writes them with `write`. The file is made first, so that it is counted once. */
static FILE *fopen_with(const char *name, const char *path, const char *mode) {
    FILE *(*real)(const char *, const char *) = (FILE * (*)(const char *, const char *)) dlsym(RTLD_NEXT, name);
    if (mode[0] != 'r') {
        int file = open_at(AT_FDCWD, path, O_WRONLY | O_CREAT | (mode[0] == 'w' ? O_TRUNC : 0), 0666);
        if (file < 0) return NULL;
        syscall(SYS_close, file);
    }
    return real(path, mode);
}
FILE *fopen(const char *path, const char *mode) { return fopen_with("fopen", path, mode); }
FILE *fopen64(const char *path, const char *mode) { return fopen_with("fopen64", path, mode); }

int renameat2(int from_at, const char *from, int to_at, const char *to, unsigned flags) {
    char place[PATH_MAX], other[PATH_MAX];
    int is_from = resolve(from_at, from, place);
    if (resolve(to_at, to, other) || is_from)
        CHANGE("rename", place, other, 0, syscall(SYS_renameat2, from_at, from, to_at, to, flags, OURS));
    return syscall(SYS_renameat2, from_at, from, to_at, to, flags, OURS);
}
int rename(const char *from, const char *to) { return renameat2(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int from_at, const char *from, int to_at, const char *to) { return renameat2(from_at, from, to_at, to, 0); }

/* The kernel reports a rename that did not call the functions above. Call them, and return their result. */
static void rename_for(int signal, siginfo_t *info, void *context) {
    (void)signal, (void)info;
    greg_t *registers = ((ucontext_t *)context)->uc_mcontext.gregs;
    int result = registers[REG_RAX] == SYS_rename
                     ? rename((char *)registers[REG_RDI], (char *)registers[REG_RSI])
                     : renameat2(registers[REG_RDI], (char *)registers[REG_RSI], registers[REG_RDX],
                                 (char *)registers[REG_R10], registers[REG_RAX] == SYS_renameat2 ? registers[REG_R8] : 0);
    registers[REG_RAX] = result < 0 ? -errno : 0;
}

/* Programs that the armed process starts have its filter, so they need the handler, too. */
__attribute__((constructor)) static void handle_reports(void) {
    struct sigaction action = {.sa_sigaction = rename_for, .sa_flags = SA_SIGINFO | SA_NODEFER};
    sigaction(SIGSYS, &action, NULL);
}

int linkat(int from_at, const char *from, int to_at, const char *to, int flags) {
    char place[PATH_MAX], other[PATH_MAX];
    if (resolve(to_at, to, place)) {
        resolve(from_at, from, other);
        CHANGE("link", place, other, 0, syscall(SYS_linkat, from_at, from, to_at, to, flags));
    }
    return syscall(SYS_linkat, from_at, from, to_at, to, flags);
}
int link(const char *from, const char *to) { return linkat(AT_FDCWD, from, AT_FDCWD, to, 0); }

int symlinkat(const char *target, int directory, const char *path) {
    char place[PATH_MAX];
    if (resolve(directory, path, place)) CHANGE("symlink", place, target, 0, syscall(SYS_symlinkat, target, directory, path));
    return syscall(SYS_symlinkat, target, directory, path);
}
int symlink(const char *target, const char *path) { return symlinkat(target, AT_FDCWD, path); }

int unlinkat(int directory, const char *path, int flags) {
    char place[PATH_MAX];
    struct stat found;
    if (resolve(directory, path, place) && fstatat(directory, path, &found, AT_SYMLINK_NOFOLLOW) == 0)
        CHANGE(flags & AT_REMOVEDIR ? "rmdir" : "unlink", place, NULL, 0, syscall(SYS_unlinkat, directory, path, flags));
    return syscall(SYS_unlinkat, directory, path, flags);
}
int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int mkdirat(int directory, const char *path, mode_t mode) {
    char place[PATH_MAX];
    struct stat found;
    if (resolve(directory, path, place) && fstatat(directory, path, &found, AT_SYMLINK_NOFOLLOW) != 0)
        CHANGE("mkdir", place, NULL, 0, syscall(SYS_mkdirat, directory, path, mode));
    return syscall(SYS_mkdirat, directory, path, mode);
}
int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

/* --- contents --- */

static long truncate_to(const char *path, int file, off_t size) {
    char place[PATH_MAX];
    if (path == NULL ? path_of(file, place) : resolve(AT_FDCWD, path, place)) {
        if (path != NULL) CHANGE("truncate", place, NULL, size, syscall(SYS_truncate, path, size));
        CHANGE("truncate", place, NULL, size, syscall(SYS_ftruncate, file, size));
    }
    return path != NULL ? syscall(SYS_truncate, path, size) : syscall(SYS_ftruncate, file, size);
}
int truncate(const char *path, off_t size) { return truncate_to(path, -1, size); }
int truncate64(const char *path, off_t size) { return truncate_to(path, -1, size); }
int ftruncate(int file, off_t size) { return truncate_to(NULL, file, size); }
int ftruncate64(int file, off_t size) { return truncate_to(NULL, file, size); }

static int allocate(int file, int mode, off_t offset, off_t size) {
    char place[PATH_MAX];
    if (path_of(file, place)) CHANGE("write", place, NULL, 0, syscall(SYS_fallocate, file, mode, offset, size));
    return syscall(SYS_fallocate, file, mode, offset, size);
}
int fallocate(int file, int mode, off_t offset, off_t size) { return allocate(file, mode, offset, size); }
int fallocate64(int file, int mode, off_t offset, off_t size) { return allocate(file, mode, offset, size); }
int posix_fallocate(int file, off_t offset, off_t size) { return allocate(file, 0, offset, size) == 0 ? 0 : errno; }
int posix_fallocate64(int file, off_t offset, off_t size) { return allocate(file, 0, offset, size) == 0 ? 0 : errno; }

/* Disturb a write. `half` writes the first half of the bytes, `all` writes all of them. */
#define WRITE(file, half, all)                                       \
    do {                                                             \
        char place[PATH_MAX];                                        \
        if (!path_of(file, place)) return all;                       \
        int disturbed = begin("write");                              \
        if (disturbed == FAIL) {                                     \
            int failure = errno;                                     \
            end("write", place, NULL, 0, 0);                         \
            errno = failure;                                         \
            return -1;                                               \
        }                                                            \
        if (disturbed == TEAR) {                                     \
            long written = half;                                     \
            end("write", place, NULL, written, 1);                   \
            syscall(SYS_kill, getpid(), SIGKILL);                    \
            for (;;) pause();                                        \
        }                                                            \
        ssize_t result = all;                                        \
        end("write", place, NULL, result, result >= 0);              \
        return result;                                               \
    } while (0)

ssize_t write(int file, const void *data, size_t size) {
    WRITE(file, syscall(SYS_write, file, data, size / 2), syscall(SYS_write, file, data, size));
}
ssize_t pwrite(int file, const void *data, size_t size, off_t offset) {
    WRITE(file, syscall(SYS_pwrite64, file, data, size / 2, offset), syscall(SYS_pwrite64, file, data, size, offset));
}
ssize_t pwrite64(int file, const void *data, size_t size, off_t offset) { return pwrite(file, data, size, offset); }
/* Write half of some parts: the first ones, or half of the only one. */
static long half_of(int file, const struct iovec *parts, int number, off_t offset) {
    struct iovec half = {parts[0].iov_base, parts[0].iov_len / 2};
    const struct iovec *first = number == 1 ? &half : parts;
    int left = number == 1 ? 1 : number / 2;
    return offset < 0 ? syscall(SYS_writev, file, first, left) : syscall(SYS_pwritev, file, first, left, offset, 0);
}
ssize_t writev(int file, const struct iovec *parts, int number) {
    WRITE(file, half_of(file, parts, number, -1), syscall(SYS_writev, file, parts, number));
}
ssize_t pwritev(int file, const struct iovec *parts, int number, off_t offset) {
    WRITE(file, half_of(file, parts, number, offset), syscall(SYS_pwritev, file, parts, number, offset, 0));
}
ssize_t pwritev64(int file, const struct iovec *parts, int number, off_t offset) {
    return pwritev(file, parts, number, offset);
}
ssize_t sendfile(int to, int from, off_t *offset, size_t size) {
    WRITE(to, syscall(SYS_sendfile, to, from, offset, size / 2), syscall(SYS_sendfile, to, from, offset, size));
}
ssize_t sendfile64(int to, int from, off_t *offset, size_t size) { return sendfile(to, from, offset, size); }
ssize_t copy_file_range(int from, off_t *from_offset, int to, off_t *to_offset, size_t size, unsigned flags) {
    WRITE(to, syscall(SYS_copy_file_range, from, from_offset, to, to_offset, size / 2, flags),
          syscall(SYS_copy_file_range, from, from_offset, to, to_offset, size, flags));
}

/* --- syncs --- */

static void copy_to(const char *path) {
    char name[PATH_MAX + 32], buffer[1 << 16];
    ssize_t size;
    snprintf(name, sizeof name, "%s/%ld", copies, count);
    int from = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY | O_CLOEXEC, 0);
    int to = syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    while ((size = syscall(SYS_read, from, buffer, sizeof buffer)) > 0) syscall(SYS_write, to, buffer, size);
    syscall(SYS_close, from);
    syscall(SYS_close, to);
}

static int sync_file(int file, long call) {
    char place[PATH_MAX];
    struct stat found;
    if (!path_of(file, place)) return syscall(call, file);
    if (begin("sync") == FAIL) {
        int failure = errno;
        end("sync", place, NULL, 0, 0);
        errno = failure;
        return -1;
    }
    if (fstat(file, &found) == 0 && S_ISREG(found.st_mode)) copy_to(place);
    end("sync", place, NULL, count, 1);
    return 0;
}
int fsync(int file) { return sync_file(file, SYS_fsync); }
int fdatasync(int file) { return sync_file(file, SYS_fdatasync); }
