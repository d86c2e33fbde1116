// Go's net/http: ten goroutines send one request after the other until standard input ends. For each line of standard
// input it prints "answered", as soon as a request of each goroutine that began after the line was answered. At its end
// it prints a line: answered, lost, connections opened, connections closed by net/http itself.
//
// net/http closes an HTTP/1.1 connection by itself if its writer had to wait for 50 ms (`maxWriteWaitBeforeConnReuse` in its
// transport.go), and an HTTP/2 connection after GOAWAY. net/http then opens another one without an error. Every other end of a
// connection comes from the server, and is reported on standard error.
package main

import (
	"bufio"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

var made, closed atomic.Int64

// A connection whose end is watched: the TLS stream for HTTP/1.1, and the TCP stream below it for HTTP/2.
type watched struct {
	net.Conn
	isClosed atomic.Bool
}

func (connection *watched) Read(bytes []byte) (int, error) {
	read, err := connection.Conn.Read(bytes)
	if err != nil && !connection.isClosed.Load() {
		fmt.Fprintln(os.Stderr, "the server ended a connection:", err)
	}
	return read, err
}

func (connection *watched) Close() error {
	if !connection.isClosed.Swap(true) {
		closed.Add(1)
	}
	return connection.Conn.Close()
}

func main() {
	url, protocol := os.Args[1], os.Args[3]
	seconds, err := strconv.Atoi(os.Args[2])
	if err != nil {
		panic(err)
	}
	chain, err := os.ReadFile(os.Args[4])
	if err != nil {
		panic(err)
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(chain)
	dial := func(ctx context.Context, network, address string) (net.Conn, error) {
		// net/http uses HTTP/2 only on a *tls.Conn, so there the connection below TLS is watched.
		isHTTP2 := protocol == "HTTP/2.0"
		config := &tls.Config{RootCAs: roots, ServerName: "localhost"}
		if isHTTP2 {
			config.NextProtos = []string{"h2"}
		}
		connection, err := new(net.Dialer).DialContext(ctx, network, address)
		if err != nil {
			return nil, err
		}
		made.Add(1)
		if isHTTP2 {
			connection = &watched{Conn: connection}
		}
		secured := tls.Client(connection, config)
		if err := secured.HandshakeContext(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "the TLS handshake failed:", err)
			return nil, err
		}
		if isHTTP2 {
			return secured, nil
		}
		return &watched{Conn: secured}, nil
	}
	transport := &http.Transport{
		DialTLSContext:      dial,
		ForceAttemptHTTP2:   protocol == "HTTP/2.0",
		MaxConnsPerHost:     10,
		MaxIdleConnsPerHost: 10,
	}
	client := &http.Client{Transport: transport}
	// So that a test that hangs does not leave this process behind.
	time.AfterFunc(time.Duration(seconds)*time.Second, func() {
		fmt.Fprintln(os.Stderr, "standard input did not end within", seconds, "s")
		os.Exit(1)
	})
	var asked atomic.Int64
	var ends atomic.Bool
	var answered, lost atomic.Int64
	ask := func() bool {
		// A POST, because net/http does not retry it.
		request, err := http.NewRequest("POST", url, nil)
		if err != nil {
			panic(err)
		}
		answer, err := client.Do(request)
		if err == nil {
			_, err = io.ReadAll(answer.Body)
			answer.Body.Close()
			if err == nil && (answer.StatusCode != 200 || answer.Proto != protocol) {
				err = errors.New(answer.Proto + " " + answer.Status)
			}
			if answer.Close {
				fmt.Fprintln(os.Stderr, "the server ends a connection with its response")
			}
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			lost.Add(1)
			return false
		}
		answered.Add(1)
		return true
	}
	// until: the lines read before the last answered request of each goroutine began.
	var mutex sync.Mutex
	reported, until := int64(0), make([]int64, 10)
	note := func(number int, asked int64) {
		mutex.Lock()
		defer mutex.Unlock()
		until[number] = asked
		// Go 1.19 does not have the package slices.
		oldest := asked
		for _, other := range until {
			if other < oldest {
				oldest = other
			}
		}
		for reported < oldest {
			fmt.Println("answered")
			reported++
		}
	}
	go func() {
		for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
			asked.Add(1)
		}
		ends.Store(true)
	}()
	// One request first, because each goroutine that finds no HTTP/2 connection opens one.
	ask()
	var group sync.WaitGroup
	for number := range until {
		group.Add(1)
		number := number // Before Go 1.22 all iterations share the variable of the loop.
		go func() {
			defer group.Done()
			for isLast := false; !isLast; {
				var askedFor int64
				isLast, askedFor = ends.Load(), asked.Load()
				if ask() {
					note(number, askedFor)
				}
			}
		}()
	}
	group.Wait()
	fmt.Println(answered.Load(), lost.Load(), made.Load(), closed.Load())
}
