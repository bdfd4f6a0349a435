package store

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/bits"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// FormatVersion is the newest format of a directory that this version reads, and the one it writes.
const FormatVersion = 1

const formatLine = "offset-sidecar store "

// LockedError says that another process holds the directory.
type LockedError struct {
	Dir, Holder string // Holder is its process id, if it could be read
}

func (e *LockedError) Error() string {
	who := "another process"
	if e.Holder != "" {
		who = "process " + e.Holder
	}
	return fmt.Sprintf("data directory %s is in use by %s: stop that one, or give this one a data directory of its own", e.Dir, who)
}

// NewerFormatError says that a newer version wrote the directory.
type NewerFormatError struct {
	Dir     string
	Version int
}

func (e *NewerFormatError) Error() string {
	return fmt.Sprintf("data directory %s was written by a newer version (store format %d; this one knows up to %d): run that version, or choose another data directory",
		e.Dir, e.Version, FormatVersion)
}

// DamagedError says that something acknowledged is missing or unreadable. Nothing has been changed.
type DamagedError struct {
	Dir, Reason string
	Err         error
	spare       string // without this file what is left can be used, as it was earlier; "": there is none such
}

func (e *DamagedError) Error() string {
	msg := fmt.Sprintf("data directory %s is damaged: %s", e.Dir, e.Reason)
	if e.Err != nil {
		msg += ": " + e.Err.Error()
	}
	msg += "; nothing was moved or deleted. Restore the directory from a copy; or, "
	if e.spare != "" {
		msg += fmt.Sprintf("to go on with what is left and lose what was acknowledged after it, delete %s; or, ", e.spare)
	}
	return msg + fmt.Sprintf("to start empty and lose what it held, move %s and %s out of it", databaseName, watermarkName)
}

func (e *DamagedError) Unwrap() error { return e.Err }

func (s *Store) damaged(reason string) error {
	return &DamagedError{Dir: s.opt.Dir, Reason: reason}
}

// openError gives badger's error its place and way out.
func (s *Store) openError(err error) error {
	for e := err; e != nil; e = errors.Unwrap(e) {
		if unwritable(e) {
			return unwritableError(s.opt.Dir, err)
		}
	}
	text := err.Error()
	if strings.Contains(text, "Another process is using") {
		return &LockedError{Dir: s.opt.Dir}
	}
	// What is left of badger's errors at Open are bad manifests, tables and logs; those of the disk come as PathError.
	var path *fs.PathError
	if s.files != nil && (!errors.As(err, &path) || errors.Is(err, fs.ErrNotExist)) {
		return &DamagedError{Dir: s.opt.Dir, Reason: "its database cannot be opened", Err: err}
	}
	return fmt.Errorf("opening store in %s: %w", s.opt.Dir, err)
}

func unwritable(err error) bool {
	return errors.Is(err, fs.ErrPermission) || isReadOnly(err)
}

func unwritableError(dir string, err error) error {
	return fmt.Errorf("data directory %s cannot be written by user %d: make it writable, or choose another data directory: %w", dir, os.Getuid(), err)
}

// The names within a data directory.
const (
	databaseName  = "db"
	watermarkName = "watermark"
	// FormatName is the last file written of a new directory: what has it is a data directory.
	FormatName   = "FORMAT"
	lockName     = "LOCK"
	ballastName  = "ballast"
	incomingName = "incoming.snapshot"

	quarantinePrefix = "quarantine-"
	quarantineKept   = 3
)

// files is what lies around the database: lock, format, watermark, ballast, a snapshot that is coming in.
type files struct {
	dir   string
	log   *slog.Logger
	lock  *os.File
	mark  *watermark
	guard *guard
}

func (f *files) path(name string) string { return filepath.Join(f.dir, name) }
func (f *files) database() string        { return f.path(databaseName) }

// openFiles takes the lock, which is kept until close.
func openFiles(opt Options, log *slog.Logger) (*files, error) {
	if err := os.MkdirAll(opt.Dir, 0o700); err != nil {
		if unwritable(err) {
			return nil, unwritableError(opt.Dir, err)
		}
		return nil, fmt.Errorf("data directory %s cannot be created: choose another data directory: %w", opt.Dir, err)
	}
	f := &files{dir: opt.Dir, log: log, guard: newGuard(opt, log)}
	// The format comes before the lock: a directory of a newer version may be one that we cannot even lock.
	var damaged *DamagedError
	if err := f.checkFormat(); err != nil && !errors.As(err, &damaged) {
		return nil, err
	}
	lock, err := os.OpenFile(f.path(lockName), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		if unwritable(err) {
			return nil, unwritableError(opt.Dir, err)
		}
		return nil, fmt.Errorf("data directory %s cannot be locked: %w", opt.Dir, err)
	}
	if err := lockFile(lock); err != nil {
		holder := make([]byte, 20)
		n, _ := lock.ReadAt(holder, 0)
		lock.Close()
		return nil, &LockedError{Dir: opt.Dir, Holder: string(bytes.TrimSpace(holder[:n]))}
	}
	f.lock = lock
	pid := []byte(strconv.Itoa(os.Getpid()) + "\n")
	if err := errors.Join(lock.Truncate(0), writeAll(lock, pid)); err != nil {
		log.Debug("writing the process id into the lock", "err", err)
	}
	return f, nil
}

func writeAll(f *os.File, b []byte) error {
	_, err := f.WriteAt(b, 0)
	return err
}

// checkFormat refuses a directory that a newer version wrote.
func (f *files) checkFormat() error {
	text, err := os.ReadFile(f.path(FormatName))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("data directory %s cannot be read: %w", f.dir, err)
	}
	rest, ok := strings.CutPrefix(string(text), formatLine)
	first, _, _ := strings.Cut(rest, "\n")
	version, err := strconv.Atoi(strings.TrimSpace(first))
	if !ok || err != nil || version < 1 {
		if _, err := os.Stat(filepath.Join(f.database(), manifestName)); err == nil {
			return f.noFormat(fmt.Sprintf("its file %s cannot be made out (%q)", FormatName, text))
		}
		return fmt.Errorf("data directory %s is not one of this program's, or its file %s is damaged (%q): choose another data directory", f.dir, FormatName, text)
	}
	if version > FormatVersion {
		return &NewerFormatError{Dir: f.dir, Version: version}
	}
	return nil
}

func ourFormat() string { return fmt.Sprintf("%s%d\n", formatLine, FormatVersion) }

func (f *files) noFormat(reason string) error {
	return &DamagedError{Dir: f.dir, Reason: fmt.Sprintf("%s; if this version wrote it, write the line %q into %s", reason, ourFormat(), FormatName)}
}

// mendFormat puts right one flipped bit, unless it makes another version of ours.
func (f *files) mendFormat() error {
	text, err := os.ReadFile(f.path(FormatName))
	want := ourFormat()
	var damaged *DamagedError
	if err != nil || len(text) != len(want) || !errors.As(f.checkFormat(), &damaged) {
		return nil
	}
	flipped := 0
	for i := range text {
		flipped += bits.OnesCount8(text[i] ^ want[i])
	}
	if flipped != 1 {
		return nil
	}
	f.log.Warn("one bit of a file was flipped: it is put right", "file", f.path(FormatName), "was", string(text))
	return f.writeFormat()
}

// writeFormat replaces the file, or there is no change.
func (f *files) writeFormat() error {
	tmp := f.path(FormatName + ".new")
	if err := writeSynced(tmp, []byte(ourFormat())); err != nil {
		if unwritable(err) {
			return unwritableError(f.dir, err)
		}
		return fmt.Errorf("writing %s: %w", tmp, err)
	}
	if err := errors.Join(os.Rename(tmp, f.path(FormatName)), syncDir(f.dir)); err != nil {
		return fmt.Errorf("writing %s: %w", f.path(FormatName), err)
	}
	return nil
}

// prepare checks format, space and watermark before the database is opened.
func (f *files) prepare() error {
	if err := f.mendFormat(); err != nil {
		return err
	}
	if err := f.checkFormat(); err != nil {
		return err
	}
	if err := f.guard.admit(); err != nil {
		return err
	}
	mark, err := openWatermark(f.path(watermarkName))
	if err != nil {
		if unwritable(err) {
			return unwritableError(f.dir, err)
		}
		return fmt.Errorf("opening %s: %w", f.path(watermarkName), err)
	}
	f.mark = mark
	_, dbErr := os.Stat(f.database())
	_, formatErr := os.Stat(f.path(FormatName))
	if formatErr == nil {
		if dbErr != nil && mark.index > 0 {
			return &DamagedError{Dir: f.dir, Reason: fmt.Sprintf("its database is gone, but %d entries were acknowledged", mark.index), Err: dbErr}
		}
		return f.sweep()
	}
	if dbErr == nil {
		return f.noFormat("it has a database but no file " + FormatName)
	}
	return f.writeFormat() // the last thing written of a new directory and the first that is read
}

// sweep deletes the logs of badger that hold no byte. Badger creates a log and then gives it its size; a kill in
// between leaves one with which badger does not open, and which never held anything.
func (f *files) sweep() error {
	names, err := os.ReadDir(f.database())
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("sweeping %s: %w", f.database(), err)
	}
	for _, e := range names {
		if suffix := filepath.Ext(e.Name()); suffix != walSuffix && suffix != valueLogSuffix || !e.Type().IsRegular() {
			continue
		}
		name := filepath.Join(f.database(), e.Name())
		info, err := e.Info()
		if err == nil && info.Size() == 0 {
			f.log.Info("deleting an empty log that a kill left", "file", name)
			err = os.Remove(name)
		}
		if err != nil {
			return fmt.Errorf("sweeping %s: %w", name, err)
		}
	}
	return nil
}

func writeSynced(path string, b []byte) error {
	w, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = w.Write(b)
	return errors.Join(err, w.Sync(), w.Close())
}

// quarantine moves database, watermark and an incoming snapshot into a directory of their own.
func (f *files) quarantine(now time.Time) (string, error) {
	if f.mark != nil {
		f.mark.close()
		f.mark = nil
	}
	// A disk that damages again and again must not fill up with what it damaged.
	before, err := filepath.Glob(f.path(quarantinePrefix + "*"))
	if err != nil {
		return "", err
	}
	for len(before) >= quarantineKept {
		if err := os.RemoveAll(before[0]); err != nil {
			return "", err
		}
		before = before[1:]
	}
	aside := f.path(quarantinePrefix + now.UTC().Format("20060102T150405.000Z"))
	if err := os.Mkdir(aside, 0o700); err != nil {
		return "", err
	}
	for _, name := range []string{databaseName, watermarkName, incomingName, FormatName} {
		if err := os.Rename(f.path(name), filepath.Join(aside, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return aside, syncDir(f.dir)
}

func (f *files) close() error {
	var err error
	if f.mark != nil {
		err = f.mark.close()
	}
	// Empty before it is let go: a reader that fails to lock must not blame a process that is gone.
	return errors.Join(err, f.lock.Truncate(0), f.lock.Close())
}
