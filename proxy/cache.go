package proxy

import (
	"bytes"
	"encoding/binary"
	"slices"
	"strconv"

	"github.com/twmb/franz-go/pkg/kerr"
	"github.com/twmb/franz-go/pkg/kmsg"
)

// learnVersions keeps what a broker speaks, for the next start too.
func (t *table) learnVersions(addr string, answer *kmsg.ApiVersionsResponse) {
	node := t.nodeOf(addr)
	raw := encodeVersions(answer)
	t.mu.Lock()
	defer t.mu.Unlock()
	if old := t.answers[node]; old != nil && bytes.Equal(encodeVersions(old), raw) {
		return
	}
	t.answers[node] = answer
	t.judgeVersions()
	t.save(versionsKey(node), raw)
}

// loadVersions is called with mu held.
func (t *table) loadVersions(node int32) {
	if t.answers[node] != nil {
		return
	}
	raw, err := t.proxy.store.Get(versionsKey(node))
	if err != nil || len(raw) < 2 {
		return
	}
	answer := kmsg.NewPtrApiVersionsResponse()
	answer.Version = int16(binary.BigEndian.Uint16(raw))
	if answer.ReadFrom(raw[2:]) == nil {
		t.answers[node] = answer
	}
}

func versionsKey(node int32) string { return storedAnswers + "/" + strconv.Itoa(int(node)) }

func encodeVersions(answer *kmsg.ApiVersionsResponse) []byte {
	return answer.AppendTo(binary.BigEndian.AppendUint16(nil, uint16(answer.Version)))
}

// judgeVersions finds out what all brokers have in common. It is called with mu held. Brokers that were never reached
// are taken to be like the others.
func (t *table) judgeVersions() {
	t.topicIDs, t.common = false, nil
	for _, id := range append([]int32{anyNode}, t.current...) {
		switch answer := t.answers[id]; {
		case answer == nil:
		case t.common == nil:
			t.common = answer
		default:
			t.common = inCommon(t.common, answer)
		}
	}
	if t.common == nil {
		return
	}
	for _, k := range t.common.ApiKeys {
		if k.ApiKey == keyMetadata {
			t.topicIDs = k.MaxVersion >= 10
		}
	}
}

// inCommon gives what two brokers of one cluster both have. Finalized features are the cluster's.
func inCommon(a, b *kmsg.ApiVersionsResponse) *kmsg.ApiVersionsResponse {
	both := *a
	both.ApiKeys = nil
	for _, k := range a.ApiKeys {
		i := slices.IndexFunc(b.ApiKeys, func(x kmsg.ApiVersionsResponseApiKey) bool { return x.ApiKey == k.ApiKey })
		if i < 0 {
			continue
		}
		k.MinVersion, k.MaxVersion = max(k.MinVersion, b.ApiKeys[i].MinVersion), min(k.MaxVersion, b.ApiKeys[i].MaxVersion)
		if k.MinVersion <= k.MaxVersion {
			both.ApiKeys = append(both.ApiKeys, k)
		}
	}
	both.SupportedFeatures = nil
	for _, f := range a.SupportedFeatures {
		i := slices.IndexFunc(b.SupportedFeatures, func(x kmsg.ApiVersionsResponseSupportedFeature) bool { return x.Name == f.Name })
		if i < 0 {
			continue
		}
		f.MinVersion, f.MaxVersion = max(f.MinVersion, b.SupportedFeatures[i].MinVersion), min(f.MaxVersion, b.SupportedFeatures[i].MaxVersion)
		if f.MinVersion <= f.MaxVersion {
			both.SupportedFeatures = append(both.SupportedFeatures, f)
		}
	}
	return &both
}

// known gives what ApiVersions is answered from on a node's listener: that broker's answer; else, and on the bootstrap
// listener, which leads to any of them, what all brokers have in common.
func (t *table) known(node int32) known {
	t.mu.RLock()
	defer t.mu.RUnlock()
	k := known{upstream: t.common, topicIDs: t.topicIDs, clusterID: t.cluster, nodeID: node}
	if answer := t.answers[node]; answer != nil && node != anyNode {
		k.upstream = answer
	}
	return k
}

// kept answers Metadata and DescribeCluster from what is known while no broker can be asked; nil for anything else.
// Topics are named with as many partitions as they had, but no leaders, which clients take as a reason to ask again.
func (t *table) kept(req kmsg.Request) kmsg.Response {
	for _, id := range t.nodes() {
		if _, _, ok := t.advertise(id); !ok {
			t.open(id)
		}
	}
	t.mu.RLock()
	defer t.mu.RUnlock()
	if len(t.current) == 0 {
		return nil
	}
	switch req := req.(type) {
	case *kmsg.MetadataRequest:
		return t.keptMetadata(req)
	case *kmsg.DescribeClusterRequest:
		resp := req.ResponseKind().(*kmsg.DescribeClusterResponse)
		if req.EndpointType > 1 {
			return nil
		}
		resp.ClusterID, resp.ControllerID = t.cluster, t.control
		for _, id := range t.current {
			b := t.brokers[id]
			if b == nil || b.listener == nil {
				continue
			}
			x := kmsg.NewDescribeClusterResponseBroker()
			x.NodeID, x.Host, x.Port, x.Rack = id, t.proxy.advertiseHost, int32(b.port), b.rack
			resp.Brokers = append(resp.Brokers, x)
		}
		return resp
	}
	return nil
}

func (t *table) keptMetadata(req *kmsg.MetadataRequest) kmsg.Response {
	if len(req.Topics) == 0 && (req.Version == 0 || req.Topics == nil) {
		return nil // all topics: a list that lacks some would make pattern subscribers give them up
	}
	resp := req.ResponseKind().(*kmsg.MetadataResponse)
	if t.cluster != "" {
		resp.ClusterID = kmsg.StringPtr(t.cluster)
	}
	resp.ControllerID = t.control
	for _, id := range t.current {
		b := t.brokers[id]
		if b == nil || b.listener == nil {
			continue
		}
		x := kmsg.NewMetadataResponseBroker()
		x.NodeID, x.Host, x.Port, x.Rack = id, t.proxy.advertiseHost, int32(b.port), b.rack
		resp.Brokers = append(resp.Brokers, x)
	}
	for _, asked := range req.Topics {
		x := kmsg.NewMetadataResponseTopic()
		x.Topic, x.TopicID, x.ErrorCode = asked.Topic, asked.TopicID, kerr.LeaderNotAvailable.Code
		name := ""
		if asked.Topic != nil {
			name = *asked.Topic
		} else if known, ok := t.proxy.upstream.TopicName(asked.TopicID); ok {
			name = known
			x.Topic = &known
		}
		if id, partitions, ok := t.proxy.upstream.Topic(name); ok {
			x.TopicID, x.ErrorCode = id, 0
			for i := range partitions {
				y := kmsg.NewMetadataResponseTopicPartition()
				y.Partition, y.ErrorCode, y.Leader = i, kerr.LeaderNotAvailable.Code, -1
				x.Partitions = append(x.Partitions, y)
			}
		}
		resp.Topics = append(resp.Topics, x)
	}
	return resp
}
