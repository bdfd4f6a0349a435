package store

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/dgraph-io/badger/v4/pb"
)

// The bytes of badger's MANIFEST (manifest.go): a magic number and version, then records.
const (
	manifestStart = "Bdgr\x00\x00\x00\x08"
	manifestMagic = len(manifestStart)
	manifestHead  = 8 // of a record: length of its content, CRC32C of its content
)

// manifest is what badger's MANIFEST says. Each record is a change of the set of tables; it is appended and synced
// after the new tables are on disk, and before the tables or the write-ahead log that they replace are deleted.
type manifest struct {
	tables map[uint64]bool // whatever it mentions; false: it has been replaced
	// before: badger once wrote the MANIFEST anew from the tables that it had then. Of those with a number up to this one
	// there may be some that it had had before.
	before uint64
	end    int // of its whole records
	size   int // of the file
}

// readManifest reads a MANIFEST up to a record that is not whole and reaches its end: a crash may have torn that.
func readManifest(b []byte) (manifest, error) {
	m := manifest{tables: map[uint64]bool{}, end: manifestMagic, size: len(b)}
	if !strings.HasPrefix(string(b), manifestStart) {
		return m, errors.New("cannot be made out")
	}
	for {
		r := reader{b: b[m.end:]}
		length, sum := r.bytes(4), r.bytes(4)
		if r.bad || int64(binary.BigEndian.Uint32(length)) > int64(len(r.b)) {
			return m, nil
		}
		content := r.bytes(uint64(binary.BigEndian.Uint32(length)))
		if crc32.Checksum(content, castagnoli) != binary.BigEndian.Uint32(sum) {
			if len(r.b) == 0 {
				return m, nil
			}
			return m, fmt.Errorf("does not fit its checksum at byte %d", m.end)
		}
		if !m.apply(content) {
			return m, fmt.Errorf("cannot be made out at byte %d", m.end)
		}
		m.end = len(b) - len(r.b)
	}
}

// apply takes over one pb.ManifestChangeSet; false: it is none.
func (m *manifest) apply(content []byte) bool {
	set := reader{b: content}
	for len(set.b) > 0 {
		tag := set.byte()
		change := reader{b: set.bytes(set.uvarint())}
		var fields [7]uint64 // by number; all are varints
		for len(change.b) > 0 {
			if key := change.byte(); key&7 == 0 && key>>3 < 7 {
				fields[key>>3] = change.uvarint()
			} else {
				return false
			}
		}
		if set.bad || change.bad || tag != 1<<3|2 {
			return false
		}
		id := fields[1]
		m.tables[id] = pb.ManifestChange_Operation(fields[2]) == pb.ManifestChange_CREATE
		if m.end == manifestMagic {
			m.before = max(m.before, id)
		}
	}
	return true
}

// headOf identifies a MANIFEST: badger rewrites it now and then, from another first record.
func headOf(manifest []byte) (head uint64) {
	if len(manifest) >= manifestMagic+manifestHead {
		head = binary.BigEndian.Uint64(manifest[manifestMagic:])
	}
	return head
}

// checkManifest reads which tables there are; holds says that there is something of which it should know.
func (d *database) checkManifest(holds bool) error {
	b, err := os.ReadFile(filepath.Join(d.dir, manifestName))
	if errors.Is(err, fs.ErrNotExist) {
		if holds {
			return damage(manifestName, "is gone, which says what the others are")
		}
		return nil
	}
	if err != nil {
		return err
	}
	if d.manifest, err = readManifest(b); err != nil {
		return damage(manifestName, "%v", err)
	}
	if noted := d.mark.manifest; noted.bytes > int64(d.manifest.end) && noted.head == headOf(b) {
		return damage(manifestName, "ends at byte %d, but has had %d", d.manifest.end, noted.bytes)
	}
	return nil
}

// checkUnnamed looks whether the end of the MANIFEST is missing, with tables that it named: badger would delete them. A
// crash leaves tables that are not named yet, too: those that a compaction has made, of named ones that are still there;
// and the one that a flush has made of a write-ahead log that is still there. Since tables are flushed in their order,
// the log of one that holds more than the named ones begins at or before its newest transaction.
func (d *database) checkUnnamed(names []string) error {
	for _, name := range names {
		id, err := strconv.ParseUint(strings.TrimSuffix(name, tableSuffix), 10, 64)
		if err != nil {
			continue // none of badger's
		}
		if _, known := d.manifest.tables[id]; known || id <= d.manifest.before {
			continue
		}
		b, err := os.ReadFile(filepath.Join(d.dir, name))
		if err != nil {
			return err
		}
		version, err := verifyTable(b)
		if err != nil || version <= d.maxVersion || d.firstLogged > 0 && d.firstLogged <= version {
			continue // half written, or nothing is in it alone
		}
		// A power cut leaves it so as well, under --fsync never: the table is on disk, and of the log nothing is.
		return &DamagedError{spare: filepath.Join(databaseName, name), Reason: fmt.Sprintf(
			"file %s does not name %s, which alone holds transactions up to %d: its end, from byte %d on, is missing or damaged, or the machine lost power under --fsync never",
			filepath.Join(databaseName, manifestName), name, version, d.manifest.end)}
	}
	return nil
}

// mendManifest cuts off what a crash has left of a record that was about to be appended. Badger does so itself where the
// record is too short, and refuses one of which a part is zeroes.
func (d *database) mendManifest() error {
	if d.manifest.end == d.manifest.size {
		return nil
	}
	name := filepath.Join(d.dir, manifestName)
	d.log.Info("cutting off a half-written record", "file", name, "bytes", d.manifest.size-d.manifest.end)
	return os.Truncate(name, int64(d.manifest.end))
}
