package replicate

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/hashicorp/raft"
	"github.com/offset-sidecar/offset-sidecar/replicate/store"
)

// Names of local keys that say which cluster a store belongs to.
const (
	clusterIDKey = "cluster-id"
	// clusterEpochKey is a decimal number, absent: 0. Each recovery raises it, and a member of a lower epoch has a log
	// that the others have parted from: it must not be heard, and must start empty.
	clusterEpochKey = "cluster-epoch"
)

// SurvivorServer is one server of a survivor's newest configuration.
type SurvivorServer struct {
	ID    string
	Voter bool
}

// Survivor is what a data directory has kept of its cluster. Of several, the one with the highest LastTerm, and among
// those with the highest LastIndex, has everything that a majority of which it was a member ever acknowledged.
type Survivor struct {
	Dir string
	// NodeID is this replica's; ClusterID is its cluster's, "" if it was never told.
	NodeID, ClusterID string
	Epoch             uint64
	// LastTerm and LastIndex are those of the newest entry here, acknowledged or not. Applied is how far the compacted
	// log had come; the rest is replayed.
	LastTerm, LastIndex, Applied uint64
	// Newest is when the newest record was written, by its leader's clock: commits acknowledged later are not here.
	// Zero: there is no record.
	Newest time.Time
	// Servers is the newest configuration, ConfigurationIndex its entry's.
	Servers            []SurvivorServer
	ConfigurationIndex uint64
}

// Newer says whether s has more than o: the one to recover from.
func (s *Survivor) Newer(o *Survivor) bool {
	if s.LastTerm != o.LastTerm {
		return s.LastTerm > o.LastTerm
	}
	return s.LastIndex > o.LastIndex
}

// Inspect tells what a data directory holds. No sidecar may be using it, and nothing that it holds is changed.
func Inspect(dir string) (Survivor, error) {
	var found Survivor
	err := offline(dir, func(s *store.Store) (err error) {
		found, err = survivor(dir, s)
		return err
	})
	return found, err
}

// Recover makes a data directory a cluster of one voter, in one step: it happens or it does not. First it calls agree
// with what will survive, under the directory's lock, and does nothing if that returns an error, which it gives back.
// At its next start the sidecar leads alone, commits whatever is in its log, and other sidecars can join; the epoch is
// one higher, so that the old members, which may hold what is lost here, know that they must start empty.
func Recover(dir string, agree func(Survivor) error) error {
	return offline(dir, func(s *store.Store) error {
		found, err := survivor(dir, s)
		if err != nil {
			return err
		}
		if found.LastIndex == 0 {
			return fmt.Errorf("recovering data directory %s: it holds no cluster's state: choose another survivor", dir)
		}
		if err := agree(found); err != nil {
			return err
		}
		id := raft.ServerID(found.NodeID)
		alone := raft.Configuration{Servers: []raft.Server{{Suffrage: raft.Voter, ID: id, Address: raft.ServerAddress(id)}}}
		epoch := strconv.AppendUint(nil, found.Epoch+1, 10)
		if _, _, err := s.ForceMembership(alone, map[string][]byte{clusterEpochKey: epoch, removedKey: nil}); err != nil {
			return fmt.Errorf("recovering data directory %s: %w", dir, err)
		}
		return nil
	})
}

// offline opens the store of a directory that exists, without raft.
func offline(dir string, use func(*store.Store) error) error {
	if _, err := os.Stat(filepath.Join(dir, store.FormatName)); errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is not a data directory: it has no file %s", dir, store.FormatName)
	} else if err != nil {
		return fmt.Errorf("data directory %s cannot be read: %w", dir, err)
	}
	s, err := store.Open(store.Options{Dir: dir, Fsync: true, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		return err
	}
	return errors.Join(use(s), s.Close())
}

func survivor(dir string, s *store.Store) (Survivor, error) {
	found := Survivor{Dir: dir, NodeID: s.ID(), Applied: s.State().Index}
	id, err := s.Local().Get(clusterIDKey)
	if err != nil {
		return found, err
	}
	found.ClusterID = string(id)
	if found.Epoch, err = clusterEpoch(s.Local()); err != nil {
		return found, err
	}
	if found.LastIndex, found.LastTerm, err = s.LastLog(); err != nil {
		return found, err
	}
	if found.Newest, err = s.Newest(); err != nil {
		return found, err
	}
	c, index, err := s.Membership()
	if err != nil {
		return found, err
	}
	found.ConfigurationIndex = index
	for _, server := range c.Servers {
		found.Servers = append(found.Servers, SurvivorServer{ID: string(server.ID), Voter: server.Suffrage == raft.Voter})
	}
	return found, nil
}

// clusterEpoch reads how often the cluster has been recovered.
func clusterEpoch(local *store.Local) (uint64, error) {
	v, err := local.Get(clusterEpochKey)
	if err != nil || v == nil {
		return 0, err
	}
	epoch, err := strconv.ParseUint(string(v), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("local key %s: %w", clusterEpochKey, err)
	}
	return epoch, nil
}
