package store

import (
	"errors"
	"fmt"
	"time"

	badger "github.com/dgraph-io/badger/v4"
	"github.com/hashicorp/raft"
)

// LastLog gives the index and term of the newest entry that raft knows here, that of a snapshot included; 0, 0 in an
// empty store.
func (s *Store) LastLog() (index, term uint64, err error) {
	s.mu.Lock()
	index, term = s.flushed.Index, s.flushed.Term
	s.mu.Unlock()
	last, err := s.raftLog.LastIndex()
	if err != nil || last <= index {
		return index, term, err
	}
	var entry raft.Log
	if err := s.raftLog.GetLog(last, &entry); err != nil {
		return 0, 0, err
	}
	return last, entry.Term, nil
}

// Membership is raft's newest configuration here, committed or not, and the index of its entry; 0 if there is none.
func (s *Store) Membership() (c raft.Configuration, index uint64, err error) {
	s.mu.Lock()
	applied, encoded := s.flushed.Index, s.flushed.Configuration
	if index = s.flushed.ConfigurationIndex; index > 0 {
		c = raft.DecodeConfiguration(encoded)
	}
	s.mu.Unlock()
	first, last := s.raftLog.ends()
	for i := max(first, applied+1); last > 0 && i <= last; i++ {
		var entry raft.Log
		if err := s.raftLog.GetLog(i, &entry); err != nil {
			return c, index, err
		}
		if entry.Type == raft.LogConfiguration {
			c, index = raft.DecodeConfiguration(entry.Data), i
		}
	}
	return c, index, nil
}

// Newest is when the newest record here was written: by the clock of the leader that appended its entry, or, where
// raft's log does not reach back to it, by the clock of the replica that flushed it. Zero if there is no record.
func (s *Store) Newest() (time.Time, error) {
	first, last := s.raftLog.ends()
	for i := last; i > 0 && i >= first; i-- {
		var entry raft.Log
		if err := s.raftLog.GetLog(i, &entry); err != nil {
			return time.Time{}, err
		}
		if entry.Type == raft.LogCommand && !entry.AppendedAt.IsZero() {
			return entry.AppendedAt, nil
		}
	}
	var newest time.Time
	err := s.view1(func(txn *badger.Txn) error {
		return s.eachKey(txn, []byte{rangeLatest, shard}, func(item *badger.Item) {
			_ = item.Value(func(v []byte) error {
				if st, _, err := decodeLatest(item.Key(), v); err == nil && st.Time.After(newest) {
					newest = st.Time
				}
				return nil
			})
		})
	})
	return newest, err
}

// lostTerms is more elections than can have passed here unheard: who knows of the last of them, and was never a server,
// must find every term of the new configuration newer.
const lostTerms = 1_000_000

// ForceMembership makes c raft's newest configuration, whatever the servers of the old one say: an entry of a term of
// its own ends the log, and once raft is started the servers in c alone decide that everything here is committed. That
// is raft.RecoverCluster without its four writes: it is one transaction, which puts local along with it (nil removes
// a key). Raft must not be running.
func (s *Store) ForceMembership(c raft.Configuration, local map[string][]byte) (index, term uint64, err error) {
	if fresh, err := s.Fresh(); err != nil || fresh {
		return 0, 0, errors.Join(err, errors.New("there is no raft state: nothing can be recovered here"))
	}
	last, lastTerm, err := s.LastLog()
	if err != nil {
		return 0, 0, err
	}
	current, err := s.stable.GetUint64(keyCurrentTerm)
	if err != nil {
		return 0, 0, err
	}
	index, term = last+1, max(current, lastTerm)+lostTerms
	entry := &raft.Log{Index: index, Term: term, Type: raft.LogConfiguration, Data: raft.EncodeConfiguration(c), AppendedAt: time.Now()}
	err = s.raftLog.store([]*raft.Log{entry}, func(txn *badger.Txn) error {
		for name, value := range local {
			if err := setOrDelete(txn, localKey(name), value); err != nil {
				return err
			}
		}
		return txn.Set(stableKey(keyCurrentTerm), encodeUint64(term))
	})
	if err != nil {
		return 0, 0, fmt.Errorf("forcing raft's configuration: %w", err)
	}
	return index, term, nil
}

func (l *RaftLog) ends() (first, last uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.first, l.last
}
