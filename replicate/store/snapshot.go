package store

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"sync"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/hashicorp/raft"
)

// A snapshot stream is frames: be32 length, payload, be32 CRC32C of the payload. The first payload is the magic and
// the encoded State, the last is empty, those between are pairs of the compacted log and latest, as they are in the
// database: uvarint key length, key, uvarint value length, value.
const (
	snapshotMagic = "ossnap\x01"
	frameBytes    = 512 << 10 // where a frame is cut: with one more pair it still fits a transaction
	framePairs    = 4096
	maxFrameBytes = 2 << 20

	restoreRoom = 16 << 20 // that must be free for the next transaction of a restore: it may bring about a table
)

// Snapshots is raft's snapshot store. What is flushed is the snapshot: there is at most one, and taking it writes
// nothing but the applied index.
type Snapshots struct {
	s *Store

	mu       sync.Mutex
	incoming *incoming
}

// incoming is a snapshot that came from elsewhere and has not been restored yet.
type incoming struct {
	meta raft.SnapshotMeta
	mem  []byte // in memory; else it is the file incomingName
}

var _ raft.SnapshotStore = (*Snapshots)(nil)

// Create begins a snapshot. Closed without a write it is one of our own: everything up to index must have been
// flushed. With writes it is one from elsewhere, to be restored next.
func (n *Snapshots) Create(version raft.SnapshotVersion, index, term uint64, c raft.Configuration, cIndex uint64, _ raft.Transport) (raft.SnapshotSink, error) {
	if version != raft.SnapshotVersionMax {
		return nil, fmt.Errorf("snapshot version %d is not supported", version)
	}
	meta := raft.SnapshotMeta{Version: version, ID: fmt.Sprintf("incoming-%d-%d", term, index), Index: index, Term: term, Configuration: c, ConfigurationIndex: cIndex}
	return &sink{n: n, meta: meta}, nil
}

// List gives what is flushed, if anything is.
func (n *Snapshots) List() ([]*raft.SnapshotMeta, error) {
	n.s.mu.Lock()
	defer n.s.mu.Unlock()
	if n.s.flushed.ConfigurationIndex == 0 {
		return nil, nil
	}
	return []*raft.SnapshotMeta{metaOf(&n.s.flushed)}, nil
}

func metaOf(s *State) *raft.SnapshotMeta {
	return &raft.SnapshotMeta{
		Version: raft.SnapshotVersionMax, ID: fmt.Sprintf("applied-%d-%d", s.Term, s.Index), Index: s.Index, Term: s.Term,
		Configuration: raft.DecodeConfiguration(s.Configuration), ConfigurationIndex: s.ConfigurationIndex,
	}
}

// Open streams the compacted log. Meta and data come from one read transaction, so the meta may be newer than what
// List gave: a stream newer than its meta would make a replay take the same offsets twice.
func (n *Snapshots) Open(id string) (*raft.SnapshotMeta, io.ReadCloser, error) {
	n.mu.Lock()
	in := n.incoming
	n.mu.Unlock()
	if in != nil && in.meta.ID == id {
		meta := in.meta
		if n.s.files == nil {
			return &meta, io.NopCloser(bytes.NewReader(in.mem)), nil
		}
		f, err := os.Open(n.s.files.path(incomingName))
		return &meta, f, err
	}
	txn := n.s.db.NewTransaction(false)
	r, meta, err := openSnapshot(txn)
	if err != nil {
		txn.Discard()
		return nil, nil, fmt.Errorf("opening snapshot: %w", err)
	}
	return meta, r, nil
}

func openSnapshot(txn *badger.Txn) (*snapshotReader, *raft.SnapshotMeta, error) {
	value, err := getFrom(txn, appliedKey)
	if err != nil {
		return nil, nil, err
	}
	body, ok := unseal(appliedKey, value)
	if !ok {
		return nil, nil, errors.New("nothing has been flushed yet")
	}
	state, err := decodeState(body)
	if err != nil {
		return nil, nil, err
	}
	if state.ConfigurationIndex == 0 {
		return nil, nil, errors.New("no configuration has been flushed yet")
	}
	header := append([]byte(snapshotMagic), body...)
	size := int64(len(header)) + 16
	for p := (pairs{txn: txn}); ; {
		n, err := p.next(func(*badger.Item) error { return nil })
		if err != nil {
			return nil, nil, err
		}
		if n == 0 {
			break
		}
		size += int64(n) + 8
	}
	meta := metaOf(&state)
	meta.Size = size
	r := &snapshotReader{pairs: pairs{txn: txn}}
	r.frame(header)
	return r, meta, nil
}

// pairs walks the compacted log and latest, a frame at a time.
type pairs struct {
	txn   *badger.Txn
	it    *badger.Iterator
	stage int
}

var snapshotRanges = []byte{rangeLog, rangeLatest}

// next calls each with the pairs of the next frame and gives the bytes of its payload, 0 at the end.
func (p *pairs) next(each func(*badger.Item) error) (int, error) {
	size := 0
	for count := 0; count < framePairs; count++ {
		for p.it == nil || !p.it.Valid() {
			p.close()
			if p.stage == len(snapshotRanges) {
				return size, nil
			}
			opt := badger.DefaultIteratorOptions
			opt.PrefetchValues = false
			opt.Prefix = []byte{snapshotRanges[p.stage], shard}
			p.it = p.txn.NewIterator(opt)
			p.it.Rewind()
			p.stage++
		}
		item := p.it.Item()
		k, v := int(item.KeySize()), int(item.ValueSize())
		pair := uvarintLen(k) + k + uvarintLen(v) + v
		if size > 0 && size+pair > frameBytes {
			return size, nil
		}
		if err := each(item); err != nil {
			return 0, err
		}
		size += pair
		p.it.Next()
	}
	return size, nil
}

func (p *pairs) close() {
	if p.it != nil {
		p.it.Close()
		p.it = nil
	}
}

func uvarintLen(n int) int {
	var b [binary.MaxVarintLen64]byte
	return binary.PutUvarint(b[:], uint64(n))
}

// snapshotReader builds frames as they are read.
type snapshotReader struct {
	pairs   pairs
	payload []byte
	buf     []byte // what is left of the current frame
	done    bool
}

func (r *snapshotReader) frame(payload []byte) {
	r.buf = binary.BigEndian.AppendUint32(nil, uint32(len(payload)))
	r.buf = append(r.buf, payload...)
	r.buf = binary.BigEndian.AppendUint32(r.buf, crc32.Checksum(payload, castagnoli))
}

func (r *snapshotReader) Read(b []byte) (int, error) {
	if len(r.buf) == 0 {
		if r.done {
			return 0, io.EOF
		}
		r.payload = r.payload[:0]
		n, err := r.pairs.next(func(item *badger.Item) error {
			r.payload = binary.AppendUvarint(r.payload, uint64(item.KeySize()))
			r.payload = append(r.payload, item.Key()...)
			r.payload = binary.AppendUvarint(r.payload, uint64(item.ValueSize()))
			return item.Value(func(v []byte) error {
				r.payload = append(r.payload, v...)
				return nil
			})
		})
		if err != nil {
			return 0, err
		}
		r.done = n == 0
		r.frame(r.payload)
	}
	n := copy(b, r.buf)
	r.buf = r.buf[n:]
	return n, nil
}

func (r *snapshotReader) Close() error {
	r.pairs.close()
	r.pairs.txn.Discard()
	return nil
}

// sink is a snapshot in the making.
type sink struct {
	n      *Snapshots
	meta   raft.SnapshotMeta
	file   *os.File
	mem    []byte
	wrote  int64
	closed bool
}

func (k *sink) ID() string {
	if k.wrote == 0 {
		return fmt.Sprintf("applied-%d-%d", k.meta.Term, k.meta.Index)
	}
	return k.meta.ID
}

// Write spools a snapshot from elsewhere.
func (k *sink) Write(b []byte) (int, error) {
	files := k.n.s.files
	if files == nil {
		k.mem = append(k.mem, b...)
		k.wrote += int64(len(b))
		return len(b), nil
	}
	if err := files.guard.check(int64(len(b))); err != nil {
		return 0, err
	}
	if k.file == nil {
		f, err := os.OpenFile(files.path(incomingName+".new"), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
		if err != nil {
			return 0, err
		}
		k.file = f
	}
	n, err := k.file.Write(b)
	k.wrote += int64(n)
	return n, err
}

// Close finishes the snapshot. Raft closes it twice.
func (k *sink) Close() error {
	if k.closed {
		return nil
	}
	k.closed = true
	if k.wrote == 0 {
		return k.n.s.raise(&k.meta)
	}
	if err := k.keep(); err != nil {
		return fmt.Errorf("a snapshot from elsewhere is refused, nothing was changed: %w", err)
	}
	k.meta.Size = k.wrote
	k.n.mu.Lock()
	k.n.incoming = &incoming{meta: k.meta, mem: k.mem}
	k.n.mu.Unlock()
	return nil
}

// keep checks a snapshot from elsewhere, whole, before anything is given up for it, and puts it where Open finds it.
func (k *sink) keep() error {
	if k.file == nil {
		return verifySnapshot(bytes.NewReader(k.mem))
	}
	files := k.n.s.files
	_, err := k.file.Seek(0, io.SeekStart)
	if err == nil {
		err = verifySnapshot(bufio.NewReaderSize(k.file, 64<<10))
	}
	if err == nil {
		err = k.file.Sync()
	}
	if err := errors.Join(err, k.file.Close()); err != nil {
		return errors.Join(err, os.Remove(k.file.Name()))
	}
	return errors.Join(os.Rename(k.file.Name(), files.path(incomingName)), syncDir(files.dir))
}

// verifySnapshot reads a stream to its end: header, pairs of the right ranges and with the right checksums, the empty
// frame, and nothing after it.
func verifySnapshot(r io.Reader) error {
	if _, err := readHeader(r); err != nil {
		return err
	}
	for {
		payload, err := readFrame(r)
		if err != nil {
			return err
		}
		if len(payload) == 0 {
			break
		}
		err = eachPair(payload, func(key, value []byte) error {
			if _, ok := unseal(key, value); !ok {
				return fmt.Errorf("the value of key %q fails its checksum", key)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	if n, err := r.Read(make([]byte, 1)); n != 0 || !errors.Is(err, io.EOF) {
		return errors.Join(errors.New("something follows its end"), err)
	}
	return nil
}

// Cancel drops the snapshot.
func (k *sink) Cancel() error {
	if k.closed {
		return nil
	}
	k.closed = true
	k.mem = nil
	if k.file == nil {
		return nil
	}
	return errors.Join(k.file.Close(), os.Remove(k.file.Name()))
}

// raise moves the applied index up to the snapshot's: what lies between are barriers, which change nothing.
func (s *Store) raise(meta *raft.SnapshotMeta) error {
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	state := s.flushed.clone()
	if state.Index >= meta.Index && state.ConfigurationIndex >= meta.ConfigurationIndex {
		return nil
	}
	if state.Index < meta.Index {
		state.Index, state.Term = meta.Index, meta.Term
	}
	if state.ConfigurationIndex < meta.ConfigurationIndex {
		state.ConfigurationIndex = meta.ConfigurationIndex
		state.Configuration = raft.EncodeConfiguration(meta.Configuration)
	}
	if err := s.checkSpace(); err != nil {
		return err
	}
	err := s.update(func(txn *badger.Txn) error { return txn.Set(appliedKey, seal(appliedKey, state.encode())) })
	if err != nil {
		return fmt.Errorf("writing the applied index: %w", err)
	}
	s.mu.Lock()
	s.flushed = state
	s.mu.Unlock()
	return nil
}

// Restore replaces the compacted log by the snapshot that came from elsewhere, which r reads; raft's log up to it is
// dropped. It waits while space is low. A crash in between is made good at the next Open, from the file the stream was
// spooled to; so is an error, after which the store is not used any more.
func (s *Store) Restore(r io.Reader) error {
	s.snapshots.mu.Lock()
	in := s.snapshots.incoming
	s.snapshots.mu.Unlock()
	if in == nil {
		return errors.New("restoring a snapshot: none has come in")
	}
	if err := s.restore(r, &in.meta); err != nil {
		return fmt.Errorf("restoring a snapshot: %w", err)
	}
	s.snapshots.mu.Lock()
	s.snapshots.incoming = nil
	s.snapshots.mu.Unlock()
	s.reached("reset")
	s.dropIncoming()
	return nil
}

func (s *Store) dropIncoming() {
	if s.files == nil {
		return
	}
	for _, name := range []string{incomingName, incomingName + ".new"} {
		if err := os.Remove(s.files.path(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.log.Warn("removing a restored snapshot", "err", err)
		}
	}
}

func (s *Store) restore(r io.Reader, meta *raft.SnapshotMeta) error {
	state, err := readHeader(r)
	if err != nil {
		return err
	}
	if s.files != nil {
		if err := s.files.guard.check(2 * meta.Size); err != nil { // in badger's log and in its tables
			return err
		}
	}
	// A snapshot restored by hand takes an index of its own.
	state.Index, state.Term = meta.Index, meta.Term
	state.ConfigurationIndex, state.Configuration = meta.ConfigurationIndex, raft.EncodeConfiguration(meta.Configuration)
	state.Installed = state.Index
	s.restoring.Lock()
	defer s.restoring.Unlock()
	s.flushMu.Lock()
	defer s.flushMu.Unlock()
	err = s.update(func(txn *badger.Txn) error { return txn.Set(restoringKey, seal(restoringKey, state.encode())) })
	if err != nil {
		return err
	}
	s.reached("marked")
	err = s.replace(r, state, func() error {
		if s.files != nil && !s.files.guard.waitFor(s.stop, restoreRoom) {
			return ErrClosing
		}
		return nil
	})
	if err != nil {
		s.fatal(fmt.Errorf("a snapshot was only partly restored, the next start finishes it: %w", err))
	}
	return err
}

// readHeader reads the first frame.
func readHeader(r io.Reader) (State, error) {
	header, err := readFrame(r)
	if err != nil {
		return State{}, err
	}
	body, ok := bytes.CutPrefix(header, []byte(snapshotMagic))
	if !ok {
		return State{}, errors.New("not a snapshot of a known version")
	}
	return decodeState(body)
}

// replace empties the compacted log, loads the rest of a stream and sets state.
func (s *Store) replace(r io.Reader, state State, room func() error) error {
	for _, kind := range snapshotRanges {
		if err := room(); err != nil {
			return err
		}
		if err := s.wipe(kind); err != nil {
			return err
		}
	}
	for {
		payload, err := readFrame(r)
		if err != nil {
			return err
		}
		if len(payload) == 0 {
			break
		}
		if err := room(); err != nil {
			return err
		}
		s.reached("filling")
		if err := s.update(func(txn *badger.Txn) error { return eachPair(payload, txn.Set) }); err != nil {
			return err
		}
	}
	s.reached("filled")
	err := s.update(func(txn *badger.Txn) error {
		if err := txn.Delete(restoringKey); err != nil {
			return err
		}
		return txn.Set(appliedKey, seal(appliedKey, state.encode()))
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	s.tail, s.tailBytes = nil, 0
	s.flushed, s.current = state, state.clone()
	s.room.Broadcast()
	s.mu.Unlock()
	s.reached("replaced")
	return s.raftLog.reset(state.Installed)
}

func (s *Store) wipe(kind byte) error {
	for {
		n := 0
		err := s.update(func(txn *badger.Txn) error {
			opt := badger.DefaultIteratorOptions
			opt.PrefetchValues = false
			opt.Prefix = []byte{kind, shard}
			it := txn.NewIterator(opt)
			defer it.Close()
			for it.Rewind(); it.Valid() && n < deleteChunk; it.Next() {
				if err := txn.Delete(it.Item().KeyCopy(nil)); err != nil {
					return err
				}
				n++
			}
			return nil
		})
		if err != nil || n == 0 {
			return err
		}
	}
}

func eachPair(payload []byte, yield func(key, value []byte) error) error {
	for r := (reader{b: payload}); len(r.b) > 0; {
		key := r.bytes(r.uvarint())
		value := r.bytes(r.uvarint())
		if r.bad || len(key) < 2 || bytes.IndexByte(snapshotRanges, key[0]) < 0 {
			return errors.New("malformed pair")
		}
		if err := yield(key, value); err != nil {
			return err
		}
	}
	return nil
}

func readFrame(r io.Reader) ([]byte, error) {
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return nil, fmt.Errorf("stream is cut short: %w", err)
	}
	n := binary.BigEndian.Uint32(head[:])
	if n > maxFrameBytes {
		return nil, fmt.Errorf("frame of %d bytes, over the limit of %d", n, maxFrameBytes)
	}
	b := make([]byte, n+4)
	if _, err := io.ReadFull(r, b); err != nil {
		return nil, fmt.Errorf("stream is cut short: %w", err)
	}
	if binary.BigEndian.Uint32(b[n:]) != crc32.Checksum(b[:n], castagnoli) {
		return nil, errors.New("checksum mismatch in a frame")
	}
	return b[:n], nil
}

// resumeRestore finishes a restore that a crash cut short.
func (s *Store) resumeRestore() error {
	value, err := s.get(restoringKey)
	if err != nil {
		return err
	}
	if value == nil {
		s.dropIncoming()
		return nil
	}
	body, ok := unseal(restoringKey, value)
	if !ok {
		return s.damaged("the mark of an unfinished restore fails its checksum")
	}
	state, err := decodeState(body)
	if err != nil {
		return s.damaged(err.Error())
	}
	f, err := os.Open(s.files.path(incomingName))
	if err != nil {
		return &DamagedError{Dir: s.opt.Dir, Reason: "a snapshot was only partly restored, and it is gone", Err: err}
	}
	defer f.Close()
	if _, err := readFrame(f); err != nil {
		return &DamagedError{Dir: s.opt.Dir, Reason: "a snapshot was only partly restored", Err: err}
	}
	if err := s.raftLog.load(); err != nil {
		return err
	}
	err = s.replace(f, state, s.checkSpace)
	if errors.Is(err, ErrNoSpace) {
		return err
	}
	if err != nil {
		return &DamagedError{Dir: s.opt.Dir, Reason: "a snapshot was only partly restored", Err: err}
	}
	s.dropIncoming()
	return nil
}
