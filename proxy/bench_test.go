package proxy_test

import (
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"
)

// echoServer answers ApiVersions, and any other request with a reply of some bytes, with as little work as it can.
func echoServer(b *testing.B, size int, sendBuffer ...int) string {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = ln.Close() })
	reply := make([]byte, 8+size)
	binary.BigEndian.PutUint32(reply, uint32(4+size))
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			for _, n := range sendBuffer {
				_ = c.(*net.TCPConn).SetWriteBuffer(n)
			}
			go func() {
				defer c.Close()
				buf := make([]byte, 64<<10)
				out := slices.Clone(reply)
				for {
					if _, err := io.ReadFull(c, buf[:12]); err != nil {
						return
					}
					rest := int(binary.BigEndian.Uint32(buf)) - 8
					frame := buf[4 : 12+rest]
					if _, err := io.ReadFull(c, buf[12:12+rest]); err != nil {
						return
					}
					if binary.BigEndian.Uint16(frame) == 18 {
						r := request{frame: frame}
						r.APIVersion = int16(binary.BigEndian.Uint16(frame[2:]))
						r.CorrelationID = int32(binary.BigEndian.Uint32(frame[4:]))
						_, _ = c.Write(versionsOf(r))
						continue
					}
					copy(out[4:8], frame[4:8])
					if _, err := c.Write(out); err != nil {
						return
					}
				}
			}()
		}
	}()
	return ln.Addr().String()
}

func cpu() time.Duration {
	var u syscall.Rusage
	_ = syscall.Getrusage(syscall.RUSAGE_SELF, &u)
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkProduce is the round trip of a Produce of 100 bytes, one after the other: what the proxy adds is the
// difference of the medians.
func BenchmarkProduce(b *testing.B) {
	addr := echoServer(b, 50)
	request := frame(0, 3, 1, append([]byte{255, 255, 0, 1}, make([]byte, 100)...))
	for _, way := range []string{"direct", "proxy"} {
		b.Run(way, func(b *testing.B) {
			to := addr
			if way == "proxy" {
				to = start(b, config(addr)).Addr().String()
			}
			c, err := net.Dial("tcp", to)
			if err != nil {
				b.Fatal(err)
			}
			defer c.Close()
			reply := make([]byte, 58)
			var took []time.Duration
			used := cpu()
			for b.Loop() {
				begin := time.Now()
				if _, err := c.Write(request); err != nil {
					b.Fatal(err)
				}
				if _, err := io.ReadFull(c, reply); err != nil {
					b.Fatal(err)
				}
				took = append(took, time.Since(begin))
			}
			b.ReportMetric(float64((cpu()-used).Nanoseconds())/float64(b.N)/1e3, "cpu-µs/op")
			slices.Sort(took)
			b.ReportMetric(float64(took[len(took)/2].Nanoseconds())/1e3, "p50-µs")
			b.ReportMetric(float64(took[len(took)*99/100].Nanoseconds())/1e3, "p99-µs")
		})
	}
}

// BenchmarkFetch reads replies of 1 MiB (and of other sizes) with two requests outstanding. The CPU time is that of the
// whole process: client and server as well, which the direct way shows alone.
func BenchmarkFetch(b *testing.B) {
	for _, size := range []int{1 << 10, 16 << 10, 60 << 10, 100 << 10, 1 << 20} {
		addr := echoServer(b, size)
		for _, way := range []string{"direct", "proxy"} {
			b.Run(fmt.Sprintf("%dKiB/%s", size>>10, way), func(b *testing.B) {
				to := addr
				var s *side
				if way == "proxy" {
					s = start(b, config(addr))
					to = s.Addr().String()
				}
				c, err := net.Dial("tcp", to)
				if err != nil {
					b.Fatal(err)
				}
				defer c.Close()
				request := frame(1, 4, 1, make([]byte, 30))
				buf := make([]byte, 8+size)
				b.SetBytes(int64(size))
				if _, err := c.Write(request); err != nil {
					b.Fatal(err)
				}
				used := cpu()
				for b.Loop() {
					if _, err := c.Write(request); err != nil {
						b.Fatal(err)
					}
					if _, err := io.ReadFull(c, buf); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric((cpu()-used).Seconds()/(float64(b.N)*float64(size)/1e9), "cpu-s/GB")
				if s != nil {
					spliced, copied := float64(s.metrics.Value(splicedBytes)), float64(s.metrics.Value(copiedBytes))
					b.ReportMetric(100*spliced/(spliced+copied), "%spliced")
				}
			})
		}
	}
}

// BenchmarkFetchInParallel reads replies of 1 MiB on six connections at once from a server whose sockets take as little
// at a time as Kafka's (socket.send.buffer.bytes), so that replies come in parts.
func BenchmarkFetchInParallel(b *testing.B) {
	const size, connections = 1 << 20, 6
	addr := echoServer(b, size, 100<<10)
	for _, way := range []string{"direct", "proxy"} {
		b.Run(way, func(b *testing.B) {
			to := addr
			if way == "proxy" {
				to = start(b, config(addr)).Addr().String()
			}
			request := frame(1, 4, 1, make([]byte, 30))
			b.SetBytes(size)
			b.ResetTimer()
			used := cpu()
			var all sync.WaitGroup
			for i := range connections {
				all.Go(func() {
					c, err := net.Dial("tcp", to)
					if err != nil {
						b.Error(err)
						return
					}
					defer c.Close()
					buf := make([]byte, 8+size)
					for range (b.N + i) / connections {
						if _, err := c.Write(request); err != nil {
							b.Error(err)
							return
						}
						if _, err := io.ReadFull(c, buf); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			all.Wait()
			b.ReportMetric((cpu()-used).Seconds()/(float64(b.N)*float64(size)/1e9), "cpu-s/GB")
		})
	}
}
