package store

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/dgraph-io/badger/v4/fb"
)

// Badger's files, as version 4.9.6 writes them (memtable.go, discard.go, key_registry.go, table/table.go).
const (
	tableSuffix     = ".sst"
	manifestName    = badger.ManifestFilename
	keyRegistryName = badger.KeyRegistryFileName
	discardName     = "DISCARD"

	logHeaderBytes  = 20 // of a .mem or .vlog: key id, 0 without encryption; initialisation vector
	discardBytes    = 1 << 20
	registrySanity  = "Hello Badger"
	registryIVBytes = 16

	metaTxn    = 1 << 6 // the entry is part of a transaction
	metaFinTxn = 1 << 7 // it ends one
	maxWalKey  = 1 << 16
)

// database is badger's directory before badger opens it. Badger ends a write-ahead log at the first byte that it does
// not understand, leaves out what a cut MANIFEST does not name and deletes its tables, exits the process over some
// broken tables (log.Fatal), and has changed its files by the time that we could look for what is missing. So all of
// it is read first, and nothing that was acknowledged can go without a word.
type database struct {
	dir  string
	log  *slog.Logger
	mark *watermark

	manifest    manifest
	maxVersion  uint64 // of all tables, as far as they still have it
	firstLogged uint64 // the first transaction of all write-ahead logs; 0: there is none
}

// check gives a DamagedError without Dir, or an error of the disk; nil also if there is no database yet. It mends what
// holds nothing of ours.
func (d *database) check() error {
	names, err := os.ReadDir(d.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var logs, tables []string
	for _, e := range names {
		switch filepath.Ext(e.Name()) {
		case walSuffix:
			logs = append(logs, e.Name())
		case tableSuffix:
			tables = append(tables, e.Name())
		case valueLogSuffix:
			err = errors.Join(err, d.mend(e.Name(), valueLogIsSound))
		}
	}
	err = errors.Join(err, d.mend(discardName, discardIsSound), d.mend(keyRegistryName, registryIsSound))
	if err != nil {
		return err
	}
	if err := d.checkManifest(len(logs)+len(tables) > 0); err != nil {
		return err
	}
	for id, named := range d.manifest.tables {
		if !named {
			continue
		}
		if err := d.checkTable(id); err != nil {
			return err
		}
	}
	if err := d.checkLogs(logs); err != nil {
		return err
	}
	if err := d.checkUnnamed(tables); err != nil {
		return err
	}
	return d.mendManifest()
}

// damage names a file of the database.
func damage(name, format string, args ...any) error {
	return &DamagedError{Reason: "file " + filepath.Join(databaseName, name) + " " + fmt.Sprintf(format, args...)}
}

// mend removes a file that badger cannot use as it is. Only for files that hold nothing of ours: badger makes new ones.
func (d *database) mend(name string, sound func([]byte) bool) error {
	b, err := os.ReadFile(filepath.Join(d.dir, name))
	if errors.Is(err, fs.ErrNotExist) || err == nil && sound(b) {
		return nil
	}
	if err != nil {
		return err
	}
	d.log.Warn("a file of the database is damaged; it holds no data and is made anew", "file", filepath.Join(d.dir, name))
	return os.Remove(filepath.Join(d.dir, name))
}

// valueLogIsSound: no value is large enough for the value log, so it has a header alone; one with an entry is left
// for badger to judge.
func valueLogIsSound(b []byte) bool {
	if len(b) == 0 || len(b) < logHeaderBytes || !allZero(b[:8]) {
		return len(b) == 0
	}
	_, n := walEntry(b[logHeaderBytes:])
	return n > 0 || allZero(b[logHeaderBytes:])
}

// discardIsSound: it counts what could be removed from the value log, which is nothing.
func discardIsSound(b []byte) bool {
	return len(b) == 0 || len(b) == discardBytes && allZero(b)
}

// registryIsSound: nothing is encrypted, so there are no keys in it.
func registryIsSound(b []byte) bool {
	return len(b) == registryIVBytes+len(registrySanity) && string(b[registryIVBytes:]) == registrySanity
}

func allZero(b []byte) bool {
	for len(b) >= 8 {
		if binary.NativeEndian.Uint64(b) != 0 {
			return false
		}
		b = b[8:]
	}
	return len(bytes.Trim(b, "\x00")) == 0
}

func tableName(id uint64) string { return fmt.Sprintf("%06d%s", id, tableSuffix) }

// checkTable verifies every byte that badger will use of a table.
func (d *database) checkTable(id uint64) error {
	name := tableName(id)
	b, err := os.ReadFile(filepath.Join(d.dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return damage(name, "is gone")
	}
	if err != nil {
		return err
	}
	version, err := verifyTable(b)
	if err != nil {
		return damage(name, "(%d bytes): %v", len(b), err)
	}
	d.maxVersion = max(d.maxVersion, version)
	return nil
}

var errTableEnds = errors.New("it is cut short, or its end is damaged")

// verifyTable checks the index and the blocks. A table ends: index, its length, its checksum, the checksum's length.
func verifyTable(b []byte) (maxVersion uint64, err error) {
	defer func() { // the index is flat: once its checksum fits it is what badger wrote, but who knows
		if p := recover(); p != nil {
			err = fmt.Errorf("its index is damaged: %v", p)
		}
	}()
	rest, sum, ok := cutChecksum(b)
	if !ok || len(rest) < 4 {
		return 0, errTableEnds
	}
	rest, n := rest[:len(rest)-4], binary.BigEndian.Uint32(rest[len(rest)-4:])
	if uint64(n) > uint64(len(rest)) || n < 8 {
		return 0, errTableEnds
	}
	index := rest[len(rest)-int(n):]
	if crc32.Checksum(index, castagnoli) != sum {
		return 0, fmt.Errorf("its index, from byte %d on, does not fit its checksum", len(rest)-int(n))
	}
	ti := fb.GetRootAsTableIndex(index, 0)
	if ti.OffsetsLength() == 0 {
		return 0, errTableEnds
	}
	for i := range ti.OffsetsLength() {
		var at fb.BlockOffset
		if !ti.Offsets(&at, i) {
			return 0, errTableEnds
		}
		from, to := uint64(at.Offset()), uint64(at.Offset())+uint64(at.Len())
		if to > uint64(len(rest)) {
			return 0, errTableEnds
		}
		content, sum, ok := cutChecksum(b[from:to])
		if !ok || crc32.Checksum(content, castagnoli) != sum {
			return 0, fmt.Errorf("bytes %d to %d do not fit their checksum", from, to)
		}
	}
	return ti.MaxVersion(), nil
}

// cutChecksum takes badger's pb.Checksum with its length off the end: field 1, the algorithm, is 0 and left out; field
// 2 is the sum.
func cutChecksum(b []byte) (rest []byte, sum uint32, ok bool) {
	if len(b) < 4 {
		return nil, 0, false
	}
	rest, n := b[:len(b)-4], binary.BigEndian.Uint32(b[len(b)-4:])
	if uint64(n) > uint64(len(rest)) || n > 16 {
		return nil, 0, false
	}
	rest, message := rest[:len(rest)-int(n)], rest[len(rest)-int(n):]
	if len(message) == 0 {
		return rest, 0, true // a sum of 0 is left out as well
	}
	v, size := binary.Uvarint(message[1:])
	if message[0] != 2<<3 || size != len(message)-1 || v > math.MaxUint32 {
		return nil, 0, false
	}
	return rest, uint32(v), true
}

// checkLogs looks through the write-ahead logs, which lie in a row. A kill leaves a transaction cut short at the end of
// the newest; but none is missing in between, and what the watermark says was acknowledged is there.
func (d *database) checkLogs(names []string) error {
	numbers := map[string]int{}
	for _, name := range names {
		n, err := strconv.Atoi(strings.TrimSuffix(name, walSuffix))
		if err != nil {
			return damage(name, "is none of the database's: move it away")
		}
		numbers[name] = n
	}
	slices.SortFunc(names, func(a, b string) int { return numbers[a] - numbers[b] })
	// The newest transaction so far, and where it ends. It is not known until there is a log with something in it: of the
	// tables that hold what came before, a compaction may have dropped what was newest, if that was a deletion.
	known, last, end, at := false, uint64(0), 0, ""
	for _, name := range names {
		b, err := os.ReadFile(filepath.Join(d.dir, name))
		if err != nil {
			return err
		}
		if len(b) >= logHeaderBytes && !allZero(b[:8]) {
			return damage(name, "has a damaged header")
		}
		w := scanWal(b)
		if w.first > 0 && (d.firstLogged == 0 || w.first < d.firstLogged) {
			d.firstLogged = w.first
		}
		switch {
		case w.last == 0 && w.clean:
			continue // not used yet
		case w.last == 0 && !known:
			known, last, end, at = true, d.maxVersion, w.end, name
			continue
		case w.last == 0:
			continue
		case known && w.first > last+1:
			return damage(at, "is damaged at byte %d: transactions %d to %d are missing", end, last+1, w.first-1)
		}
		known, last, end, at = true, w.last, w.end, name
	}
	if known && last < d.mark.version {
		return &DamagedError{spare: watermarkName, Reason: fmt.Sprintf("file %s ends at byte %d with transaction %d, but everything up to %d was acknowledged",
			filepath.Join(databaseName, at), end, last, d.mark.version)}
	}
	return nil
}

// walScan is what a write-ahead log holds.
type walScan struct {
	first, last uint64 // transactions by their version; 0: none is whole
	end         int    // where the last whole one ends
	clean       bool   // nothing but zeroes follows
}

// scanWal reads a write-ahead log as badger's iterate does.
func scanWal(b []byte) walScan {
	w := walScan{end: min(logHeaderBytes, len(b))}
	var open uint64 // the transaction that has begun
	at := w.end
scan:
	for {
		e, n := walEntry(b[at:])
		if n == 0 {
			break
		}
		at += n
		switch {
		case e.meta&metaTxn != 0:
			if open == 0 {
				open = e.version()
			}
			if open != e.version() {
				break scan
			}
			continue
		case e.meta&metaFinTxn != 0:
			version, err := strconv.ParseUint(string(e.value), 10, 64)
			if err != nil || open != version {
				break scan
			}
		case open != 0:
			break scan
		default:
			open = e.version()
		}
		if w.first == 0 {
			w.first = open
		}
		w.last, w.end, open = open, at, 0
	}
	w.clean = allZero(b[w.end:])
	return w
}

// walRecord is one entry of a write-ahead log.
type walRecord struct {
	meta       byte
	key, value []byte
}

// version is the transaction's, which ends the key.
func (e *walRecord) version() uint64 {
	if len(e.key) <= 8 {
		return 0
	}
	return math.MaxUint64 - binary.BigEndian.Uint64(e.key[len(e.key)-8:])
}

// walEntry reads the entry at the beginning of b: meta, user meta, length of key, of value, expiry; key, value, CRC32C
// of it all. n is 0 if there is no whole one.
func walEntry(b []byte) (e walRecord, n int) {
	r := reader{b: b}
	e.meta = r.byte()
	r.byte()
	klen, vlen := r.uvarint(), r.uvarint()
	r.uvarint()
	if r.bad || klen == 0 || klen > maxWalKey {
		return e, 0
	}
	e.key = r.bytes(klen)
	e.value = r.bytes(vlen)
	size := len(b) - len(r.b)
	sum := r.bytes(4)
	if r.bad || binary.BigEndian.Uint32(sum) != crc32.Checksum(b[:size], castagnoli) {
		return e, 0
	}
	return e, size + 4
}

// openBadger opens the database. What is left of ways to panic is an error.
func openBadger(opt badger.Options) (db *badger.DB, err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = fmt.Errorf("badger gave up: %v", p)
		}
	}()
	return badger.Open(opt)
}

// checkDatabase looks for damage before badger changes anything.
func (s *Store) checkDatabase() error {
	if s.files == nil {
		return nil
	}
	d := database{dir: s.files.database(), log: s.log, mark: s.files.mark}
	err := d.check()
	var damaged *DamagedError
	if errors.As(err, &damaged) {
		damaged.Dir = s.opt.Dir
		return err
	}
	if err != nil {
		return fmt.Errorf("data directory %s cannot be read: %w", s.opt.Dir, err)
	}
	return nil
}
